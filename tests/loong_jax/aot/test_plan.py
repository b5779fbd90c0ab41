"""Clusters for a machine and a context; room; compiles of a cold start."""

import pytest

from loong_jax.aot.models import model_named
from loong_jax.aot.plan import Sizes, cluster_for, prefill_bucket, program_of, readiness, room
from loong_jax.aot.targets import Target
from loong_jax.config import ConfigError
from loong_jax.cost.hardware import hardware
from loong_jax.types import Phase, Program

V5E = Target("v5e:2x4", "tpu", [object()] * 8, hardware("v5e"))


def test_each_instance_holds_its_share_of_the_context():
    sizes = Sizes(dop=4, tp=2, context=131072)
    cluster = cluster_for(V5E, sizes)
    assert (cluster.num_instances, cluster.tp) == (4, 2)
    assert prefill_bucket(sizes) == 2048  # a chunk of 8,192 over four
    assert cluster.pages_per_instance == 131072 // 4 // 16 + 32 + 2048 // 16
    assert program_of(Phase.PREFILL, cluster, sizes) == Program(Phase.PREFILL, 4, 2048)
    assert program_of(Phase.DECODE, cluster, sizes) == Program(Phase.DECODE, 4, 32)
    assert program_of(Phase.MIGRATE, cluster, sizes) == Program(Phase.MIGRATE, 2, 64)
    assert program_of(Phase.COPY, cluster, sizes) == Program(Phase.COPY, 1, 64)


def test_sizes_of_an_operator_join_the_ladder():
    sizes = Sizes(dop=3, tp=1, context=1000, prefill_tokens=1024, decode_rows=16)
    ladder = cluster_for(V5E, sizes).ladder
    assert 1024 in ladder.prefill_tokens
    assert 16 in ladder.decode_rows
    assert {3, 8} <= set(ladder.dops)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dop": 0}, "dop: must be positive"),
        ({"tp": -1}, "tp: must be positive"),
        ({"context": 0}, "context: must be positive"),
        ({"context": 1 << 40}, "context: .* are more than"),
        ({"dop": 5}, r"dop: 5 instances of tp 2 need 10 devices, v5e:2x4 has 8"),
        ({"prefill_tokens": 100}, "prefill_tokens: 100 is no multiple of page_tokens 16"),
    ],
)
def test_refusals_name_the_field(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        cluster_for(V5E, Sizes(**{"dop": 2, "tp": 2, "context": 4096, **wrong}))


def test_a_migration_needs_two():
    sizes = Sizes(dop=1, tp=8, context=4096)
    with pytest.raises(ConfigError, match="steps: a migration needs two instances"):
        program_of(Phase.MIGRATE, cluster_for(V5E, sizes), sizes)


def test_what_is_left_is_room_for_kv():
    model, sizes = model_named("llama-3-8b"), Sizes(dop=4, tp=2, context=131072)
    cluster = cluster_for(V5E, sizes)
    # 32 layers, K and V, 4 of 8 heads on each device, 128 channels, bf16
    token_bytes = 32 * 2 * 4 * 128 * 2
    held = cluster.pages_per_instance * 16
    found = room(V5E, model, cluster, int(16e9) - 1000 * token_bytes)
    assert (found.instance_tokens, found.machine_tokens) == (held + 1000, 4 * (held + 1000))
    assert room(V5E, model, cluster, int(17e9)).instance_tokens == held
    assert room(V5E, model, cluster, int(17e9)).free_bytes == -int(1e9)


def test_compiles_of_a_cold_start():
    prefill, decode, score = (Program(phase, 1, 8) for phase in (Phase.PREFILL, Phase.DECODE, Phase.SCORE))
    needed = [(prefill, (0,)), (decode, (0,))]
    others = [(prefill, (1,)), (score, (0,))]
    found = readiness(needed, others, {Phase.PREFILL: 10.0, Phase.DECODE: 4.0})
    assert (found.needed_programs, found.needed_s) == (2, 14.0)
    assert (found.all_programs, found.all_s) == (4, 34.0)  # scoring counts as the longest
