"""Measures the batches of a cost profile on an engine: manager and executor, without a server or a policy.

Each batch is planned by hand, through the manager, so that pages and programs are those of serving. A prefill is timed
from its issue to its completion, a decode step from one completion to the next with the following one already queued,
as the live loop runs them. What it is not: the plan or the fit (`loong_jax/cost/profile.py`).
"""

from __future__ import annotations

import queue
import random
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Protocol

from loong_jax import buckets
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.profile import Batch, Measurement, chosen_dops, work_of
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    ContextForm,
    Migrate,
    Phase,
    Plan,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedMigrate,
    PlannedPrefill,
    PlannedPrefillRow,
    Program,
    ProgramReady,
    Rehome,
    Run,
    RunDecode,
    RunPrefill,
    Share,
    StepDone,
    StepFailed,
    Tick,
    View,
)
from serving.loop import ExecutorLike

REPEATS = 5
_DECODE_STEPS = 16  # the first two of them fill the queue
_MAX_TOKENS = 4 * _DECODE_STEPS
_WAIT_S = 600.0

Instances = tuple[int, ...]


class ProfilingError(RuntimeError):
    """A step of the profile failed; the message is the executor's."""


class Inbox(Protocol):
    def put(self, item: AnyEvent, /) -> None: ...
    def get(self, *, timeout: float) -> AnyEvent: ...


class _Script:
    """The policy: gives the next plan, once."""

    def __init__(self) -> None:
        self.next = Plan()

    def plan(self, view: View, cost: CostModel) -> Plan:
        plan, self.next = self.next, Plan()
        return plan


def programs(cluster: ClusterConfig) -> list[tuple[Program, Instances]]:
    """What a profile runs: the steps of the measured DoPs on the first instances, and a migration."""
    dops = chosen_dops(cluster.ladder.dops)
    out = [
        (program, tuple(range(program.dop)))
        for program in cluster.ladder.programs()
        if program.phase in (Phase.PREFILL, Phase.DECODE) and program.dop in {*dops, 1}
    ]
    if 2 in cluster.ladder.dops:
        out.append((Program(Phase.MIGRATE, 2, cluster.ladder.move_pages), (0, 1)))
    return out


class Measurer:
    """Give `post` to the executor as its way back; then `start`, then `measure`. `clock`: seconds; `inbox`: where
    events wait for the calling thread."""

    def __init__(
        self,
        cluster: ClusterConfig,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
        inbox: Inbox | None = None,
    ) -> None:
        limits = LimitsConfig(max_running=cluster.slots, max_waiting=cluster.slots)
        self._cluster, self._vocab_size = cluster, vocab_size
        self._script = _Script()
        self._manager = Manager(cluster, limits, self._script, unmeasured(cluster.ladder))
        self._clock = clock
        self._inbox: Inbox = queue.SimpleQueue() if inbox is None else inbox
        self._rng = random.Random(0)
        self._num_requests = 0
        self._executor: ExecutorLike | None = None

    def post(self, event: AnyEvent) -> None:
        self._inbox.put(event)

    def start(self, executor: ExecutorLike, ready: Iterable[tuple[Program, Instances]]) -> None:
        self._executor = executor
        for program, instances in ready:
            self._handle(ProgramReady(program, instances))

    def measure(
        self, batches: Sequence[Batch], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Measurement]:
        """In the order of `batches`. Raises ProfilingError."""
        out: list[Measurement] = []
        for done, batch in enumerate(batches):
            progress(done, len(batches))
            match batch.phase:
                case "prefill":
                    seconds = self._chunks(batch) if batch.resident else self._prefills(batch)
                case "decode":
                    seconds = self._decodes(batch)
                case "migrate":
                    seconds = self._migrations(batch)
            out.append(Measurement(batch, work_of(batch), median(seconds)))
        progress(len(batches), len(batches))
        return out

    # ---- one batch

    def _prefills(self, batch: Batch) -> list[float]:
        seconds: list[float] = []
        for repeat in range(REPEATS + 1):
            requests = [self._arrive(batch.new) for _ in range(batch.rows)]
            taken_s = self._prefill(batch.dop, requests, Run(0, batch.new), batch.form)
            if repeat:  # the first one warms caches
                seconds.append(taken_s)
            self._end(requests)
        return seconds

    def _chunks(self, batch: Batch) -> list[float]:
        """Three chunks in a row: the middle one has the context asked for."""
        first = batch.resident - batch.new
        request = self._arrive(batch.resident + 2 * batch.new)
        self._fill([request], first, batch.dop)
        seconds: list[float] = []
        for start in range(first, first + 3 * batch.new, batch.new):
            seconds.append(self._prefill(batch.dop, [request], Run(start, batch.new), batch.form))
        self._end([request])
        return seconds

    def _decodes(self, batch: Batch) -> list[float]:
        requests = [self._arrive(batch.resident) for _ in range(batch.rows)]
        self._fill(requests, batch.resident, batch.dop)
        rows = tuple(PlannedDecodeRow(request, i % batch.masters) for i, request in enumerate(requests))
        plan = Plan(decodes=(PlannedDecode(tuple(range(batch.dop)), rows),))
        steps = [self._issue(plan).step, self._issue(plan).step]
        times: list[float] = []
        for _ in range(_DECODE_STEPS):
            times.append(self._wait(steps.pop(0)))
            steps.append(self._issue(plan).step)
        for step in steps:
            self._wait(step)
        self._end(requests)
        return [later - earlier for earlier, later in zip(times[1:-1], times[2:], strict=True)]

    def _migrations(self, batch: Batch) -> list[float]:
        """There and back."""
        request = self._arrive(batch.new + self._cluster.page_tokens)
        self._fill([request], batch.new, 1)
        pages = -(-batch.new // self._cluster.page_tokens)
        seconds: list[float] = []
        src, dst = 0, 1
        for _ in range(REPEATS + 1):
            start_s = self._clock()
            command = self._issue(Plan(migrates=(PlannedMigrate(Rehome(request, src, dst, pages)),)))
            seconds.append(self._wait(command.step) - start_s)
            src, dst = dst, src
        self._end([request])
        return seconds[1:]

    # ---- steps

    def _fill(self, requests: Sequence[int], num_tokens: int, dop: int) -> None:
        """Give each of `requests` KV of its first `num_tokens` tokens, evenly over the group."""
        ladder, page_tokens = self._cluster.ladder, self._cluster.page_tokens
        most = dop * ladder.prefill_tokens[-1]
        padded = -(-num_tokens // page_tokens) * page_tokens
        together = max(1, min(ladder.prefill_rows, most // max(padded, 1)))
        for first in range(0, len(requests), together):
            for start in range(0, num_tokens, most):
                run = Run(start, min(most, num_tokens - start))
                self._prefill(dop, requests[first : first + together], run, ContextForm.RING)

    def _prefill(self, dop: int, requests: Sequence[int], run: Run, form: ContextForm) -> float:
        """Seconds of a step in which each request computes `run`."""
        units = len(requests) * buckets.num_units((run,), self._cluster.page_tokens)
        keep = tuple(Share(unit % dop, 1) for unit in range(units))
        rows = tuple(PlannedPrefillRow(request, (run,)) for request in requests)
        start_s = self._clock()
        command = self._issue(Plan(prefills=(PlannedPrefill(tuple(range(dop)), form, rows, keep),)))
        return self._wait(command.step) - start_s

    def _issue(self, plan: Plan) -> RunPrefill | RunDecode | Migrate:
        self._script.next = plan
        steps = [c for c in self._handle(Tick()) if isinstance(c, RunPrefill | RunDecode | Migrate)]
        return steps[0]

    def _wait(self, step: int) -> float:
        """The time at which `step` was done."""
        while True:
            event = self._inbox.get(timeout=_WAIT_S)
            now_s = self._clock()
            if isinstance(event, StepFailed):
                raise ProfilingError(event.reason)
            self._handle(event)
            if isinstance(event, StepDone) and event.step == step:
                return now_s

    # ---- requests

    def _arrive(self, num_tokens: int) -> int:
        self._num_requests += 1
        prompt = array("i", (self._rng.randrange(self._vocab_size) for _ in range(num_tokens))).tobytes()
        self._handle(Arrived(self._num_requests, prompt, _MAX_TOKENS))
        return self._num_requests

    def _end(self, requests: Iterable[int]) -> None:
        for request in requests:
            self._handle(Aborted(request))

    def _handle(self, event: AnyEvent) -> list[AnyCommand]:
        assert self._executor is not None, "start comes first"
        commands = self._manager.handle(event, time.monotonic_ns() // 1000)
        for command in commands:
            self._executor.submit(command)
        return commands
