import pytest

from loong_jax.config import ConfigError
from loong_jax.sim import sim_cluster
from tests.support.simulated import small_config


@pytest.mark.parametrize("change", [{"tick_us": 0}, {"drain_s": 0.0}, {"prepare_us": -1}, {"check_every": -1}])
def test_bad_fields_are_named(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        small_config([], **change)


def test_cluster_holds_what_was_asked_for() -> None:
    cluster = sim_cluster(4, pool_tokens=1000, tp=2, page_tokens=64)
    assert (cluster.num_instances, cluster.tp, cluster.pages_per_instance) == (4, 2, 15)
    assert cluster.ladder.dops == (1, 2, 3, 4)
