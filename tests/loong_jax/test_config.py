"""Configurations refuse what cannot be served, by the name of the field; the default ladder fits any cluster."""

import msgspec
import pytest

from loong_jax.config import ClusterConfig, ConfigError, LadderConfig, ModelConfig, RopeConfig, ladder_for
from loong_jax.types import Phase

MODEL = ModelConfig(
    family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=4, max_position=8,
)  # fmt: skip


@pytest.mark.parametrize("num_instances", range(1, 65))
def test_the_default_ladder_fits_any_number_of_instances(num_instances: int):
    ladder = ladder_for(num_instances)
    assert len(ladder.programs()) == len(set(ladder.programs())) == ladder.num_programs <= 64
    assert (ladder.dops[0], ladder.dops[-1]) == (1, num_instances)
    assert ClusterConfig(num_instances, ladder=ladder).ladder == ladder


def test_the_most_needed_programs_come_first():
    programs = LadderConfig().programs()
    steps = [p.dop for p in programs if p.phase in (Phase.PREFILL, Phase.DECODE)]
    assert list(dict.fromkeys(steps)) == [1, 8, 2, 3, 4]
    assert [p.phase for p in programs[-2:]] == [Phase.COPY, Phase.MIGRATE]
    assert all(p.phase is not Phase.MIGRATE for p in LadderConfig(dops=(1,)).programs()), "no pair, no migration"


def test_sizes_follow():
    cluster = ClusterConfig(8, pages_per_instance=10, page_tokens=16, slots=3)
    assert cluster.pool_tokens == 8 * 10 * 16
    assert cluster.table_entries >= cluster.pages_per_instance
    assert cluster.kv_needed(10**6) == 10**6
    windowed = msgspec.structs.replace(cluster, kv_window=100)
    assert (windowed.kv_needed(10**6), windowed.kv_needed(50)) == (100 + 4 * 16, 50)


def test_what_windows_and_scaling_mean():
    two = msgspec.structs.replace(MODEL, num_layers=2)
    window = lambda *windows: msgspec.structs.replace(two, windows=windows).kv_window
    assert window() == window(0, 0) == window(0, 8) == 0, "a layer without a window sees everything"
    assert window(4, 8) == 8
    assert window(1, 1) == 2
    assert MODEL.attention_scale == MODEL.head_dim**-0.5
    assert msgspec.structs.replace(MODEL, query_scalar=16).attention_scale == 0.25
    dynamic = RopeConfig(kind="dynamic", factor=2.0)
    assert not MODEL.rope_by_length
    assert msgspec.structs.replace(MODEL, rope=dynamic).rope_by_length
    assert msgspec.structs.replace(MODEL, windows=(8,), window_rope=dynamic).rope_by_length


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "ntk"), ("theta", 1.0), ("factor", 0.0), ("original_max_position", 0)]
)
def test_bad_rope(field: str, value: object):
    with pytest.raises(ConfigError, match=rf"^rope\.{field}: "):
        RopeConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", 0),
        ("intermediate_size", 0),
        ("num_layers", 0),
        ("num_heads", 0),
        ("num_kv_heads", 0),
        ("num_kv_heads", 3),
        ("head_dim", 3),
        ("dtype", "float16"),
        ("windows", (8,) * 50),
        ("windows", (-1,) * MODEL.num_layers),
        ("query_scalar", 0),
        ("attn_soft_cap", 0.0),
        ("logit_soft_cap", -1.0),
        ("rope factors", RopeConfig(kind="longrope", short_factor=(1.0,), long_factor=())),
    ],
)
def test_bad_model(field: str, value: object):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        msgspec.structs.replace(MODEL, **{"rope" if field == "rope factors" else field: value})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dops", {"dops": ()}),
        ("dops", {"dops": (2, 4)}),
        ("dops", {"dops": (1, 4, 2)}),
        ("dops", {"dops": (0, 1)}),
        ("prefill_tokens", {"prefill_tokens": (64, 64)}),
        ("decode_rows", {"decode_rows": (-1, 8)}),
        ("ladder", {"dops": tuple(range(1, 9))}),  # 66 programs
    ],
)
def test_bad_ladder(field: str, change: dict):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        LadderConfig(**change)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("num_instances", {"num_instances": 0}),
        ("tp", {"tp": 0}),
        ("page_tokens", {"page_tokens": 0}),
        ("pages_per_instance", {"pages_per_instance": 0}),
        ("ring_tokens", {"ring_tokens": 24}),
        ("query_tile_tokens", {"query_tile_tokens": 24}),
        ("prefill_tokens", {"ladder": LadderConfig(prefill_tokens=(24,))}),
        ("kv_window", {"kv_window": -1}),
        ("kv_window", {"kv_window": 1}),
        ("dops", {"num_instances": 4}),
        ("attention", {"attention": "triton"}),
    ],
)
def test_bad_cluster(field: str, change: dict):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ClusterConfig(**{"num_instances": 8, **change})
