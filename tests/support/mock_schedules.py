"""Random schedules against the mock executor, for any policy: small clusters of all shapes, few or all groups READY."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from functools import partial

import msgspec

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager, Policy
from loong_jax.types import Phase, Program
from tests.support.mock_executor import MockExecutor, check_reports, oracle
from tests.support.schedules import Controls, Schedule, ScheduleConfig, ScheduleRun, arcs, check_outcome, replay

MakePolicy = Callable[[ClusterConfig, LimitsConfig], Policy]


def cluster_for(rng: random.Random, *, windowed: bool = False, least: int = 1) -> ClusterConfig:
    num_instances = max(least, rng.choice((1, 2, 3, 4, 8)))
    page_tokens = rng.choice((1, 2, 4))
    dops = tuple(sorted({d for d in (1, 2, 3, 4, 8) if d <= num_instances} | {num_instances}))
    ladder = LadderConfig(
        dops=dops,
        prefill_tokens=(4 * page_tokens, 16 * page_tokens),
        decode_rows=(1, 4),
        prefill_rows=3,
        move_pages=rng.choice((1, 3)),
        score_tokens=(8 * page_tokens,),
    )
    return ClusterConfig(
        num_instances=num_instances,
        page_tokens=page_tokens,
        pages_per_instance=rng.randint(6, 24),
        ring_tokens=16,
        query_tile_tokens=16,
        slots=rng.choice((2, 5, 16)),
        ladder=ladder,
        kv_window=rng.choice((2, 3, 5, 8, 17)) if windowed else 0,
    )


def few_groups(
    rng: random.Random, cluster: ClusterConfig
) -> tuple[ClusterConfig, list[tuple[Program, tuple[int, ...]]]]:
    """Not every arc is READY: DoP 1 and the largest, aligned sets, some at random, or a ladder of small groups."""
    kind = rng.choice(("ends", "aligned", "random", "small"))
    if kind == "small":
        dops = tuple(dop for dop in cluster.ladder.dops if dop <= 2)
        cluster = msgspec.structs.replace(cluster, ladder=msgspec.structs.replace(cluster.ladder, dops=dops))
    ready = arcs(cluster)
    if kind == "ends":
        steps = (Phase.PREFILL, Phase.DECODE)
        # Scoring programs are prepared when the first such request comes.
        ready = [(p, i) for p, i in ready if p.dop in (1, cluster.ladder.dops[-1]) and p.phase in steps]
    elif kind == "aligned":
        ready = [(p, i) for p, i in ready if i[0] % len(i) == 0 and i[-1] - i[0] == len(i) - 1]
    elif kind == "random":
        ready = [(p, i) for p, i in ready if p.dop == 1 or rng.random() < 0.4]
    return cluster, ready


def run_schedule(
    seed: int, make: MakePolicy, *, all_ready: bool = True, windowed: bool = False, least: int = 1
) -> ScheduleRun:
    """A cluster of `least` instances or more, limits and a schedule by `seed`; outcomes are checked, and a replay
    with a policy made again."""
    rng = random.Random(seed)
    cluster = cluster_for(rng, windowed=windowed, least=least)
    ready = arcs(cluster)
    if not all_ready:
        cluster, ready = few_groups(rng, cluster)
    limits = LimitsConfig(
        max_waiting=rng.choice((2, 100)),
        max_running=rng.choice((2, 16)),
        chunk_tokens=rng.choice((8, 16, 64)),
        decode_headroom_pages=rng.choice((0, 1, 2)),
    )

    def policy() -> Policy:
        return make(cluster, limits)

    inbox: queue.SimpleQueue = queue.SimpleQueue()
    executor = MockExecutor(cluster, inbox.put, rng)
    manager = Manager(cluster, limits, policy(), unmeasured())
    controls = Controls(executor.advance, executor.fail, executor.lose, lambda: executor.steps_in_flight)
    # Faults in a third of the schedules only: they hide what an undisturbed run shows.
    config = ScheduleConfig(max_prompt=rng.choice((10, 40, 90)), p_fork=rng.choice((0.0, 0.02, 0.15)))
    faults = rng.choice((0, 0, 1))
    config = config._replace(p_fail=0.03 * faults, p_lose=0.01 * faults)
    run = Schedule(manager, executor, inbox, config, rng, controls, ready).run()
    for outcome in run.outcomes:
        window = cluster.kv_window
        check_outcome(outcome, partial(oracle, window=window))
        check_reports(outcome.history, outcome.tokens, outcome.tops, outcome.scores, outcome.num_prompt_top, window)
    replay(run, Manager(cluster, limits, policy(), unmeasured()))
    return run
