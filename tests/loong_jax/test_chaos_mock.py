"""Random schedules against the mock executor: the manager is right whatever the policy picks (DESIGN 8)."""

from __future__ import annotations

import queue
import random

import pytest

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.linear import LinearCost
from loong_jax.manager import Manager, Policy
from loong_jax.policy.simple_elastic import SimpleElastic
from tests.support.chaos_policy import ChaosPolicy
from tests.support.mock_executor import MockExecutor, oracle
from tests.support.schedules import Controls, Schedule, ScheduleConfig, ScheduleRun, check_outcome, replay


def cluster_for(rng: random.Random) -> ClusterConfig:
    num_instances = rng.choice((1, 2, 3, 4, 8))
    page_tokens = rng.choice((1, 2, 4))
    dops = tuple(sorted({d for d in (1, 2, 3, 4, 8) if d <= num_instances} | {num_instances}))
    ladder = LadderConfig(
        dops=dops,
        prefill_tokens=(4 * page_tokens, 16 * page_tokens),
        decode_rows=(1, 4),
        prefill_rows=3,
        move_pages=rng.choice((1, 3)),
    )
    return ClusterConfig(
        num_instances=num_instances,
        page_tokens=page_tokens,
        pages_per_instance=rng.randint(6, 24),
        ring_tokens=16,
        query_tile_tokens=16,
        slots=rng.choice((2, 5, 16)),
        ladder=ladder,
    )


def run_schedule(seed: int, *, chaos: bool, config: ScheduleConfig | None = None) -> ScheduleRun:
    rng = random.Random(seed)
    cluster = cluster_for(rng)
    limits = LimitsConfig(
        max_waiting=rng.choice((2, 100)),
        max_running=rng.choice((2, 16)),
        chunk_tokens=rng.choice((8, 16, 64)),
        decode_headroom_pages=rng.choice((0, 1, 2)),
    )

    def policy() -> Policy:
        return ChaosPolicy(cluster, limits, seed) if chaos else SimpleElastic(cluster, limits)

    inbox: queue.SimpleQueue = queue.SimpleQueue()
    executor = MockExecutor(cluster, inbox.put, rng)
    manager = Manager(cluster, limits, policy(), LinearCost())
    controls = Controls(executor.advance, executor.fail, executor.lose, lambda: executor.steps_in_flight)
    if config is None:
        # Faults in a third of the schedules only: they hide what an undisturbed run shows.
        config = ScheduleConfig(max_prompt=rng.choice((10, 40, 90)))
        if rng.random() > 0.33:
            config = config._replace(p_fail=0.0, p_lose=0.0)
    run = Schedule(manager, executor, inbox, config, rng, controls).run()
    for outcome in run.outcomes:
        check_outcome(outcome, oracle)
    replay(run, Manager(cluster, limits, policy(), LinearCost()))
    return run


@pytest.mark.parametrize("first", range(0, 300, 20))
def test_chaos(first: int) -> None:
    for seed in range(first, first + 20):
        run_schedule(seed, chaos=True)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_simple_elastic_under_faults(first: int) -> None:
    for seed in range(first, first + 20):
        run_schedule(10_000_000 + seed, chaos=False)


@pytest.mark.slow
def test_chaos_ten_thousand() -> None:
    for seed in range(1000, 11_000):
        run_schedule(seed, chaos=True)
