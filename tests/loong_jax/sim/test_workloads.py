from pathlib import Path
from statistics import mean, pstdev

import pytest

from loong_jax.config import ConfigError
from loong_jax.sim import make_workload


def gaps(workload) -> list[int]:
    times = [r.arrived_us for r in workload.requests]
    return [b - a for a, b in zip([0, *times], times, strict=False)]


def test_arrivals_have_the_rate_and_end_with_it() -> None:
    workload = make_workload("sharegpt", rate=4.0, num_requests=2000, seed=0)
    assert workload.requests[-1].arrived_us == 500_000_000
    assert pstdev(gaps(workload)) / mean(gaps(workload)) == pytest.approx(1.0, abs=0.1)
    bursts = make_workload("sharegpt", rate=4.0, num_requests=2000, seed=0, arrivals="bursts")
    assert pstdev(gaps(bursts)) / mean(gaps(bursts)) == pytest.approx(3.0, abs=0.5)


def test_same_seed_same_requests_and_the_rate_only_scales_time() -> None:
    one = make_workload("mixed", rate=1.0, num_requests=50, seed=7)
    assert one == make_workload("mixed", rate=1.0, num_requests=50, seed=7)
    assert one.requests != make_workload("mixed", rate=1.0, num_requests=50, seed=8).requests
    fast = make_workload("mixed", rate=2.0, num_requests=50, seed=7)
    assert [r.prompt_len for r in fast.requests] == one.prompt_lens
    assert [r.arrived_us for r in fast.requests] == pytest.approx([r.arrived_us / 2 for r in one.requests], abs=1)


def test_max_tokens_tells_nothing_of_the_output() -> None:
    workload = make_workload("sharegpt", rate=1.0, num_requests=200, seed=0)
    assert {r.max_tokens for r in workload.requests} == {1024}
    assert max(r.output_len for r in workload.requests) < 1024


def test_a_trace_keeps_its_own_times(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{second},{10 + second},5\n" for second in (10, 11, 14, 20))
    (tmp_path / "azure2023_conv.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    workload = make_workload("azure", rate=0.5, num_requests=3, seed=0, arrivals="trace", traces=tmp_path)
    assert [r.arrived_us for r in workload.requests] == [600_000, 2_400_000, 6_000_000]
    assert workload.prompt_lens == [20, 21, 24]
    long = make_workload("azure+1m", rate=0.5, num_requests=100, seed=0, traces=tmp_path)
    assert long.prompt_lens.count(1_000_000) == 1


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rate", {"rate": 0.0}),
        ("rate", {"rate": float("nan")}),
        ("num_requests", {"num_requests": 0}),
        ("arrivals", {"arrivals": "never"}),
        ("arrivals", {"arrivals": "trace"}),
        ("workload", {"name": "nothing"}),
        ("workload", {"name": "zipf-x"}),
        ("workload", {"name": "mixed+2m"}),
        ("traces", {"name": "azure"}),
    ],
)
def test_bad_fields_are_named(field: str, change: dict) -> None:
    with pytest.raises(ConfigError, match=field):
        make_workload(**{"name": "mixed", "rate": 1.0, "num_requests": 3, "seed": 0, **change})
