"""After readiness nothing is compiled: random schedules on a warm ladder, with regrouping, migrations, forks, aborts,
failed steps and resets, and a count of every backend compile of the process meanwhile.

What it is not: a test of tokens, which `test_chaos_engine.py` compares on the same ladder.
"""

import queue
import random
from collections import Counter

import pytest

from loong_jax.config import LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.types import AnyCommand, CopyPages, Migrate, Phase, Reset, RunDecode, RunPrefill
from tests.support.chaos_policy import ChaosPolicy
from tests.support.real_engine import CHAOS_CLUSTERS, FIXTURES, DataPlane, LossyExecutor
from tests.support.schedules import Controls, Schedule, ScheduleConfig, arcs


class Tally:
    """What the executor was given: steps by phase, groups, and how often an instance changed its group."""

    def __init__(self) -> None:
        self.steps: Counter[Phase] = Counter()
        self.groups: set[tuple[int, ...]] = set()
        self.num_regroups = self.num_resets = 0
        self._group_of: dict[int, tuple[int, ...]] = {}

    @property
    def num_steps(self) -> int:
        return self.steps.total()

    def count(self, command: AnyCommand) -> None:
        match command:
            case RunPrefill():
                self._step(Phase.PREFILL, command.instances)
            case RunDecode():
                self._step(Phase.DECODE, command.instances)
            case Migrate():
                self._step(Phase.MIGRATE, command.instances)
            case CopyPages():
                self._step(Phase.COPY, (command.instance,))
            case Reset():
                self.num_resets += 1

    def _step(self, phase: Phase, instances: tuple[int, ...]) -> None:
        self.steps[phase] += 1
        self.groups.add(instances)
        self.num_regroups += any(self._group_of.get(i, instances) != instances for i in instances)
        self._group_of.update(dict.fromkeys(instances, instances))


class CountingExecutor:
    def __init__(self, inner: LossyExecutor, tally: Tally) -> None:
        self._inner, self._tally = inner, tally

    def submit(self, command: AnyCommand) -> None:
        self._tally.count(command)
        self._inner.submit(command)


def run_steps(plane: DataPlane, num_steps: int) -> Tally:
    """Schedules on one executor until it was given so many steps and a copy; the policies take turns.

    A fork copies a page only where no step is in flight just then, which is up to the clock: hence no fixed number of
    schedules, and an end after ten times the steps.
    """
    cluster, tally = plane.cluster, Tally()
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    ready = arcs(cluster)
    lossy = LossyExecutor(plane, inbox.put)
    try:
        plane.programs.warm_up(ready)
        plane.programs.mark_ready()
        seed = 0
        while tally.num_steps < num_steps or (not tally.steps[Phase.COPY] and tally.num_steps < 10 * num_steps):
            rng = random.Random(seed)
            limits = LimitsConfig(max_running=12, chunk_tokens=rng.choice((16, 128)))
            policy = ChaosPolicy(cluster, limits, seed) if seed % 2 else Elastic(cluster, limits)
            config = ScheduleConfig(
                num_requests=12, max_prompt=rng.choice((20, 400)), max_new_tokens=30, vocab=plane.model.vocab_size,
                p_fork=0.2, p_fail=0.005, p_lose=0.0,
            )  # fmt: skip
            controls = Controls(None, lossy.fail, None, lossy.steps_in_flight)
            manager = Manager(cluster, limits, policy, unmeasured())
            Schedule(manager, CountingExecutor(lossy, tally), inbox, config, rng, controls, ready).run()
            seed += 1
    finally:
        lossy.close()
    return tally


def check_nothing_compiles(num_steps: int) -> None:
    plane = DataPlane(FIXTURES / "gqa", CHAOS_CLUSTERS["eight"])
    try:
        tally = run_steps(plane, num_steps)
        programs = plane.programs
        assert programs.compiles_after_ready == 0
        assert programs.loads_after_ready == 0
        assert programs.stray_compiles_after_ready == 0, "an operation outside the programs met a new shape"
        assert programs.background_compiles_after_ready == 0
    finally:
        plane.programs.close()
    # That nothing compiles proves nothing unless much has happened.
    assert tally.num_steps >= num_steps
    assert tally.steps[Phase.PREFILL] >= num_steps // 20
    assert tally.steps[Phase.DECODE] >= num_steps // 4
    assert tally.steps[Phase.MIGRATE] >= num_steps // 100
    assert tally.steps[Phase.COPY] >= 1
    assert tally.num_resets >= 1
    assert tally.num_regroups >= num_steps // 10
    assert len(tally.groups) >= 25


def test_nothing_compiles_after_readiness() -> None:
    check_nothing_compiles(1_000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_compiles_after_readiness_at_length() -> None:
    check_nothing_compiles(10_000)
