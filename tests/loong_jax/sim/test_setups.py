import pytest

from loong_jax.config import ConfigError
from loong_jax.sim import make_workload
from loong_jax.sim.setups import PolicySpec, Setup, bounds_of, make_config, parse_policy, slo_of

SETUP = Setup()
WORKLOAD = make_workload("zipf-1.4", rate=1.0, num_requests=200, seed=0)


def test_policy_and_where_it_runs() -> None:
    assert parse_policy("elastic", SETUP) == PolicySpec("elastic", "elastic", 4, 2)
    spec = parse_policy("static_tp@1x8", SETUP)
    assert (spec.name, spec.instances, spec.tp) == ("static_tp", 1, 8)
    config = make_config(SETUP, spec, WORKLOAD)
    assert (config.cluster.num_instances, config.cluster.tp) == (1, 8)
    assert config.cluster.pages_per_instance == 900_000 // 16
    assert not config.fused
    assert make_config(SETUP, parse_policy("chunked", SETUP), WORKLOAD).fused


@pytest.mark.parametrize("text", ["none", "elastic@", "elastic@4", "elastic@0x2"])
def test_bad_policies(text: str) -> None:
    with pytest.raises(ConfigError):
        make_config(SETUP, parse_policy(text, SETUP), WORKLOAD)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("hardware", {"hardware": "abacus"}),
        ("model", {"model": "none"}),
        ("tp", {"hardware": "v5e", "model": "llama-3.1-70b", "tp": 1}),
        ("max_running", {"max_running": 5000}),
        ("chunk_tokens", {"chunk_tokens": -1}),
    ],
)
def test_bad_fields_are_named(field: str, change: dict) -> None:
    with pytest.raises(ConfigError, match=field):
        make_config(Setup(**change), PolicySpec("", "elastic", 4, change.get("tp", 2)), WORKLOAD)


def test_pools_are_the_papers_or_what_fits() -> None:
    spec = parse_policy("elastic", SETUP)
    pages = {
        pool: make_config(Setup(pool_tokens=pool), spec, WORKLOAD).cluster.pages_per_instance for pool in (0, 32_000)
    }
    assert pages == {0: 210_000 // 16, 32_000: 2000}
    other = Setup(hardware="H100", model="llama-3.1-8b", tp=1)
    tokens = make_config(other, parse_policy("elastic", other), WORKLOAD).cluster.pages_per_instance * 16
    assert 300_000 < tokens < 500_000  # (0.9 x 80 GB - 16 GB) / 128 KiB


def test_slo_is_that_of_the_setup() -> None:
    """A prompt of 10 waits at most 15 s; one of 200K about 25 x 9.8 s, whatever policy is judged."""
    slo = slo_of(SETUP)
    assert slo.ttft_s(10) == 15
    assert slo.ttft_s(200_000) == pytest.approx(25 * 9.8, rel=0.05)
    assert slo.tpot_s == 0.05


def test_bounds() -> None:
    best, full_group = bounds_of(SETUP, WORKLOAD)
    assert 0.8 * best < full_group <= best
