"""Random schedules on the real data plane: whatever groups, chunks, splits, masters, context forms, migrations,
evictions, aborts, forks and failed steps a schedule holds, tokens are the oracle's, all invariants hold, no page leaks.

The mock's twin, which proves the manager on ten thousand schedules in seconds, is `test_chaos_mock.py`.
"""

import queue
import random
from functools import lru_cache

import pytest

from loong_jax.config import LimitsConfig
from loong_jax.cost.linear import LinearCost
from loong_jax.manager import Manager
from tests.support.chaos_policy import ChaosPolicy
from tests.support.real_engine import CHAOS_CLUSTERS, FIXTURES, DataPlane, LossyExecutor, Verdict
from tests.support.schedules import Controls, Schedule, ScheduleConfig, replay

CHECKPOINTS = {"four": "gqa", "eight": "gqa", "tp2": "mha"}


@lru_cache(maxsize=1)  # a process cannot map the executables of all of them
def data_plane(setting: str) -> DataPlane:
    return DataPlane(FIXTURES / CHECKPOINTS[setting], CHAOS_CLUSTERS[setting])


@pytest.fixture(scope="module", autouse=True)
def _unload():
    yield
    data_plane.cache_clear()


def run_schedule(setting: str, seed: int) -> list[Verdict]:
    plane, rng = data_plane(setting), random.Random(seed)
    cluster = plane.cluster
    limits = LimitsConfig(
        max_running=rng.choice((2, 8)),
        chunk_tokens=rng.choice((8, 16, 64)),
        decode_headroom_pages=rng.choice((0, 1, 2)),
    )
    config = ScheduleConfig(max_prompt=rng.choice((10, 40, 90)), vocab=plane.model.vocab_size)
    if rng.random() > 0.33:  # faults hide what an undisturbed run shows
        config = config._replace(p_fail=0.0, p_lose=0.0)

    def manager() -> Manager:
        return Manager(cluster, limits, ChaosPolicy(cluster, limits, seed), LinearCost())

    inbox: queue.SimpleQueue = queue.SimpleQueue()
    executor = LossyExecutor(plane, inbox.put)
    try:
        controls = Controls(None, executor.fail, executor.lose, executor.steps_in_flight)
        run = Schedule(manager(), executor, inbox, config, rng, controls).run()
    finally:
        executor.close()
    replay(run, manager())
    return [plane.judge.check(o.history, o.tokens, o.logprobs, o.sampling) for o in run.outcomes]


def check_schedules(setting: str, seeds: range) -> None:
    verdicts = [verdict for seed in seeds for verdict in run_schedule(setting, seed)]
    num_tokens = sum(verdict.num_tokens for verdict in verdicts)
    assert sum(verdict.num_ties for verdict in verdicts) <= 0.005 * num_tokens


BATCH = 10


@pytest.mark.parametrize(
    ("setting", "first"),
    [(s, i) for s, n in (("four", 140), ("eight", 100), ("tp2", 60)) for i in range(0, n, BATCH)],
)
def test_chaos(setting: str, first: int):
    check_schedules(setting, range(first, first + BATCH))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("setting", CHECKPOINTS)
@pytest.mark.parametrize("first", range(100_000, 103_400, 100))
def test_chaos_at_length(setting: str, first: int):
    check_schedules(setting, range(first, first + 100))
