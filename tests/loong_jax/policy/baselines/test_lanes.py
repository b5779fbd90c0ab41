"""Lanes side by side: balancers, a request that is too large for any lane; random schedules for every baseline."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from loong_jax.config import LimitsConfig
from loong_jax.policy import POLICIES
from loong_jax.policy.baselines import BASELINES
from loong_jax.types import AnyCommand, Finish, RunPrefill
from tests.support.mock_schedules import run_schedule
from tests.support.served import Served, make_cluster

LIMITS = LimitsConfig(chunk_tokens=16, decode_headroom_pages=1)


def served(policy: str, num_instances: int, pages: int = 64) -> Served:
    return Served(make_cluster(num_instances, pages=pages), LIMITS, policy=policy)


def replica_of(commands: list[AnyCommand]) -> dict[int, tuple[int, ...]]:
    return {row.request: c.instances for c in commands if isinstance(c, RunPrefill) for row in c.rows}


def test_replicas_of_2024_go_round() -> None:
    """The long and the short by turns: all the long ones meet on the same instance."""
    run = served("replicas_2024", 2, pages=256)
    for index in range(6):
        run.arrive(60 if index % 2 == 0 else 4, 4)
    run.finish()
    assert replica_of(run.commands) == {0: (0,), 1: (1,), 2: (0,), 3: (1,), 4: (0,), 5: (1,)}


def test_replicas_today_take_what_comes_where_the_least_is_left() -> None:
    """96 tokens keep instance 0 busy, so the short ones that follow all go to instance 1."""
    run = served("replicas", 2)
    run.arrive(96, 4)
    for _ in range(3):
        run.arrive(4, 4)
    run.finish()
    assert replica_of(run.commands) == {0: (0,), 1: (1,), 2: (1,), 3: (1,)}


def test_one_too_large_for_a_replica_has_all_instances_once_they_are_empty() -> None:
    run = served("replicas", 2, pages=16)  # 64 tokens an instance
    run.arrive(20, 10)
    run.arrive(80, 4)
    run.arrive(20, 2)
    run.finish()
    assert replica_of(run.commands) == {0: (0,), 1: (0, 1), 2: (0,)}
    first_of_1 = next(i for i, c in enumerate(run.commands) if isinstance(c, RunPrefill) and c.rows[0].request == 1)
    end_of_0 = next(i for i, c in enumerate(run.commands) if isinstance(c, Finish) and c.request == 0)
    assert end_of_0 < first_of_1


@pytest.mark.parametrize("policy", BASELINES)
def test_exactly_the_capacity_is_served(policy: str) -> None:
    for num_instances in (2, 5, 8):
        cluster = make_cluster(num_instances)
        capacity = cluster.pool_tokens
        for prompt_len, max_tokens in ((capacity, 1), (capacity - 7, 8), (1, capacity)):
            run = Served(cluster, LimitsConfig(chunk_tokens=32), policy=policy)
            run.arrive(3, 20)
            run.arrive(prompt_len, max_tokens)
            run.arrive(3, 20)
            run.finish()


def check_schedules(policy: str, seeds: Iterable[int]) -> None:
    for seed in seeds:
        least = 2 if policy.startswith("disaggregated") else 1
        run_schedule(seed, POLICIES[policy], all_ready=seed % 2 == 0, windowed=seed % 5 == 0, least=least)


@pytest.mark.parametrize("policy", BASELINES)
def test_random_schedules(policy: str) -> None:
    check_schedules(policy, range(60_000_000, 60_000_060))


@pytest.mark.parametrize(
    ("policy", "seeds"),
    [
        # The decoding half was full of requests that were partly there, left by a group of all instances.
        ("disaggregated", (60_001_058, 60_001_178)),
        ("disaggregated_2024", (60_000_984, 60_001_058, 60_001_178)),
        # Two batches met on an instance, and no group spanned both.
        ("loongserve", (60_000_513,)),
        ("loongserve_2024", (60_000_513,)),
    ],
)
def test_schedules_that_once_failed(policy: str, seeds: tuple[int, ...]) -> None:
    check_schedules(policy, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("policy", BASELINES)
def test_random_schedules_at_length(policy: str) -> None:
    check_schedules(policy, range(60_000_000, 60_002_000))
