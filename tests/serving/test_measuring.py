"""Measuring, against an executor on a virtual clock whose steps take what a known cost model says."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.profile import batches, fitted
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.cost.work import Work, decode_work, migrate_work, predicted_s, prefill_work
from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    Free,
    Migrate,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
)
from serving.measuring import Measurer, ProfilingError, programs

LADDER = LadderConfig(dops=(1, 2, 4), prefill_tokens=(16, 64), decode_rows=(1, 8), prefill_rows=4, move_pages=4)
CLUSTER = ClusterConfig(
    num_instances=4, page_tokens=4, pages_per_instance=256, ring_tokens=16, query_tile_tokens=16, slots=16,
    ladder=LADDER,
)  # fmt: skip
TRUTH = unmeasured(LADDER)


class VirtualEngine:
    """Executor, clock and inbox in one. Steps follow each other; `fail_at`: the number of a step that fails."""

    def __init__(self, cost: FittedCost, fail_at: int = -1) -> None:
        self.now_s = self.busy_s = 0.0
        self.works: list[Work] = []
        self._cost, self._fail_at = cost, fail_at
        self._events: deque[tuple[float, AnyEvent]] = deque()
        self._kv: dict[int, Counter[int]] = {}

    def submit(self, command: AnyCommand) -> None:
        if isinstance(command, Free):
            self._kv.pop(command.request, None)
        if not isinstance(command, RunPrefill | RunDecode | Migrate):
            return
        work, emitted = self._work(command)
        self.works.append(work)
        self.busy_s = max(self.busy_s, self.now_s) + predicted_s(self._cost, work)
        event = StepDone(command.step, (1,) * emitted, (0.0,) * emitted)
        if len(self.works) == self._fail_at:
            event = StepFailed(command.step, command.instances, "no memory")
        self._events.append((self.busy_s, event))

    def _work(self, command: RunPrefill | RunDecode | Migrate) -> tuple[Work, int]:
        """And how many tokens it samples. Keeps account of the KV itself."""
        match command:
            case RunPrefill():
                for row in command.rows:
                    units = [4] * (sum(run.count for run in row.runs) // 4)
                    self._kv.setdefault(row.request, Counter()).update(dict.fromkeys(row.homes, 0))
                    for home, count in zip(row.homes, units or [1], strict=False):
                        self._kv[row.request][home] += count
                return prefill_work(command), sum(row.emit for row in command.rows)
            case RunDecode():
                return decode_work(command, self._kv.__getitem__), len(command.rows)
            case Migrate():
                return migrate_work(command), 0

    def put(self, item: AnyEvent, /) -> None:
        raise AssertionError("nobody posts")

    def get(self, *, timeout: float) -> AnyEvent:
        self.now_s, event = self._events.popleft()
        return event

    def close(self) -> None:
        pass


def measurer(engine: VirtualEngine) -> Measurer:
    out = Measurer(CLUSTER, 100, clock=lambda: engine.now_s, inbox=engine)
    out.start(engine, programs(CLUSTER))
    return out


def test_measured_times_are_the_engines() -> None:
    engine = VirtualEngine(TRUTH)
    chosen = batches(CLUSTER)
    measured = measurer(engine).measure(chosen)
    assert [m.batch for m in measured] == chosen
    for m in measured:
        assert m.seconds == pytest.approx(predicted_s(TRUTH, m.work), rel=0.01), m.batch.name
        if m.batch.phase != "decode":  # its KV grows while it is measured
            assert m.work in engine.works
    assert max(map(abs, fitted(measured, LADDER).errors)) < 0.02


def test_progress_ends_whole() -> None:
    seen: list[tuple[int, int]] = []
    chosen = batches(CLUSTER)[:2]
    measurer(VirtualEngine(TRUTH)).measure(chosen, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_failed_step_ends_the_profile() -> None:
    with pytest.raises(ProfilingError, match="no memory"):
        measurer(VirtualEngine(TRUTH, fail_at=7)).measure(batches(CLUSTER))


def test_programs_cover_the_plan() -> None:
    there = {(program.phase, program.dop) for program, _ in programs(CLUSTER)}
    assert {(batch.phase, batch.dop) for batch in batches(CLUSTER)} <= {(str(phase), dop) for phase, dop in there}
    assert all(instances == tuple(range(program.dop)) for program, instances in programs(CLUSTER))
