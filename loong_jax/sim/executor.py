"""The simulated machine: takes the manager's commands, and says when each step is done and what it sampled.

A step starts when all its instances have finished their earlier steps, as on devices that run their programs in order;
its duration is asked of `StepTimes`. With `fused`, a prefill and a decode that head the queues of the same instances
together run as one iteration: they start and end together, and the decode adds what it costs beyond an empty one (the
weights are read once). Sampled tokens are fillers until the request's true end, which only this module and the workload
know: then comes STOP.
A step that fails takes the pools of its group along: steps queued or submitted there fail too, until a Reset.
What it is not: a check of contents (`tests/support/mock_executor.py`), or the choice of what breaks (`faults.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

from loong_jax.ledger import InvariantError, Ledger
from loong_jax.sim.config import StepTimes
from loong_jax.sim.faults import FaultPlan
from loong_jax.sim.trace import Span
from loong_jax.types import (
    AnyCommand,
    CopyPages,
    Migrate,
    Phase,
    Record,
    Reset,
    RunDecode,
    RunPrefill,
    StepCommand,
    StepDone,
    StepFailed,
)

FILLER, STOP = 1, 2
"""Token ids: anything, and the end of a text."""

MAX_QUEUED = 2


class InFlight(Record, frozen=True):
    command: StepCommand
    instances: tuple[int, ...]
    seconds: float
    decode_extra_s: float  # of a decode: beyond a step without rows


class SimExecutor:
    """`schedule(at_us, step)` is called once for each step, when it starts. `stop_at`: of each request, the position
    whose step samples its last token."""

    def __init__(
        self,
        times: StepTimes,
        num_instances: int,
        ledger: Ledger,
        schedule: Callable[[int, int], None],
        *,
        fused: bool = False,
        faults: FaultPlan | None = None,
        record: bool = False,
    ) -> None:
        self.stop_at: dict[int, int] = {}
        self.spans: list[Span] = []
        self.num_steps = 0
        self._times, self._ledger, self._schedule, self._fused, self._record = times, ledger, schedule, fused, record
        self._faults = faults
        self._failing: set[int] = set()
        self._poisoned: set[int] = set()  # instances whose pool is lost
        self._queues: list[deque[int]] = [deque() for _ in range(num_instances)]
        self._in_flight: dict[int, InFlight] = {}
        self._started: set[int] = set()
        self._fresh: list[int] = []  # submitted, not yet looked at

    @property
    def steps_in_flight(self) -> list[int]:
        return list(self._in_flight)

    # ---- commands

    def submit(self, command: StepCommand) -> None:
        """Queue a step. It may start at the next `start_ready`, when all commands of the event are in."""
        instances = (command.instance,) if type(command) is CopyPages else command.instances  # type: ignore[union-attr]
        seconds, extra_s = self._seconds(command)
        for instance in instances:
            queue = self._queues[instance]
            if len(queue) >= MAX_QUEUED:
                raise InvariantError(f"INV-6: a third step on instance {instance}: {command.step}")
            queue.append(command.step)
        self._in_flight[command.step] = InFlight(command, instances, seconds, extra_s)
        self._fresh.append(command.step)

    def start_ready(self, now_us: int) -> None:
        """Start the fresh steps whose instances are all free."""
        for step in self._fresh:
            self._try_start(step, now_us)
        self._fresh.clear()

    def apply(self, command: AnyCommand) -> None:
        """A command that is no step."""
        if isinstance(command, Reset):
            if any(self._queues[instance] for instance in command.instances):
                raise InvariantError(f"INV-6: reset of instances with steps in flight: {command.instances}")
            self._poisoned.difference_update(command.instances)

    def poison(self, instances: Iterable[int]) -> None:
        """Their pools are gone: whatever runs there fails, until they are reset."""
        self._poisoned.update(instances)

    def finish(self, step: int, now_us: int) -> StepDone | StepFailed:
        """The step leaves its devices, and what waited behind it starts. Returns what the host will hear."""
        done = self._in_flight.pop(step)
        self._started.discard(step)
        event = self.answer(step, done)
        for instance in done.instances:
            self._queues[instance].remove(step)
        heads = {queue[0]: None for instance in done.instances if (queue := self._queues[instance])}
        for head in heads:  # in the order of instances
            self._try_start(head, now_us)
        return event

    def _try_start(self, step: int, now_us: int) -> None:
        waiting = self._in_flight.get(step)
        if waiting is None or step in self._started:
            return
        for instance in waiting.instances:
            if self._queues[instance][0] != step:
                return
        partner = self._partner(waiting) if self._fused else None
        if partner is None:
            self._start((waiting,), waiting.seconds, now_us)
            return
        other = self._in_flight[partner]
        prefill, decode = (waiting, other) if isinstance(waiting.command, RunPrefill) else (other, waiting)
        self._start((waiting, other), prefill.seconds + decode.decode_extra_s, now_us)

    def _partner(self, first: InFlight) -> int | None:
        """The step behind `first`, if it can run with it: on the same instances, of the other phase, and on other
        requests, for no row can decode a token that the same iteration samples."""
        queues = [self._queues[instance] for instance in first.instances]
        behind = {queue[1] if len(queue) > 1 else None for queue in queues}
        step = behind.pop()
        if behind or step is None:
            return None
        second = self._in_flight[step]
        commands = (first.command, second.command)
        if second.instances != first.instances or {type(c) for c in commands} != {RunPrefill, RunDecode}:
            return None
        requests = [{row.request for row in command.rows} for command in commands]  # type: ignore[union-attr]
        return step if requests[0].isdisjoint(requests[1]) else None

    def _start(self, together: tuple[InFlight, ...], seconds: float, now_us: int) -> None:
        if self._faults is not None:
            seconds = self._faults.stretch(seconds)
        done_us = now_us + max(1, round(seconds * 1e6))
        for step in together:
            number = step.command.step
            if self._faults is not None and self._faults.fails():
                self._failing.add(number)
            self._started.add(number)
            self.num_steps += 1
            if self._record:
                self.spans.append(_span(step, now_us, done_us))
            self._schedule(done_us, number)

    # ---- durations

    def _seconds(self, command: StepCommand) -> tuple[float, float]:
        """(duration, and of a decode the part beyond an empty step)."""
        times = self._times
        if type(command) is RunDecode:
            dop = len(command.instances)
            rows = len(command.rows)
            per_master = rows if dop == 1 else max(Counter([row.master for row in command.rows]).values())
            seconds = times.decode_s(dop, rows, per_master, self._kv_tokens(command))
            return seconds, seconds - times.decode_s(dop, 0, 0, 0) if self._fused else 0.0
        if type(command) is RunPrefill:
            tokens = context = 0
            pairs = 0.0
            for row in command.rows:
                new = 0
                for run in row.runs:
                    new += run.count
                    pairs += run.count * (run.count / 2 + run.first)
                tokens += new
                context += row.runs[-1].end - new
            return times.prefill_s(len(command.instances), tokens, pairs, context, command.form), 0.0
        if type(command) is Migrate:
            return times.migrate_s(sum(move.run.count for move in command.moves)), 0.0
        assert type(command) is CopyPages, command
        return times.migrate_s(sum(copy.run.count for copy in command.copies)), 0.0

    def _kv_tokens(self, command: RunDecode) -> int:
        """KV that the fullest instance reads."""
        held: dict[int, int] = {}
        tokens = self._ledger.tokens
        for row in command.rows:
            for instance, count in tokens(row.request).items():
                held[instance] = held.get(instance, 0) + count
        return max(held.values(), default=0)

    # ---- samples

    def answer(self, step: int, done: InFlight) -> StepDone | StepFailed:
        """What the step tells the host."""
        if step in self._failing or not self._poisoned.isdisjoint(done.instances):
            self._failing.discard(step)
            self._poisoned.update(done.instances)
            return StepFailed(step, done.instances, "injected")
        command, stop_at = done.command, self.stop_at
        if type(command) is RunDecode:
            tokens = tuple([STOP if row.position >= stop_at[row.request] else FILLER for row in command.rows])
        elif type(command) is RunPrefill:
            tokens = tuple(
                STOP if row.runs[-1].end > stop_at[row.request] else FILLER for row in command.rows if row.emit
            )
        else:
            tokens = ()
        return StepDone(command.step, tokens, (0.0,) * len(tokens))


def _span(step: InFlight, start_us: int, end_us: int) -> Span:
    command = step.command
    if isinstance(command, RunPrefill):
        rows = tuple((row.request, sum(run.count for run in row.runs)) for row in command.rows)
        return Span(start_us, end_us, step.instances, Phase.PREFILL, rows)
    if isinstance(command, RunDecode):
        return Span(start_us, end_us, step.instances, Phase.DECODE, tuple((row.request, 1) for row in command.rows))
    if isinstance(command, Migrate):
        return Span(start_us, end_us, step.instances, Phase.MIGRATE, _counts(m for m in command.moves))
    return Span(start_us, end_us, step.instances, Phase.COPY, _counts(c for c in command.copies))


def _counts(parts: Iterable) -> tuple[tuple[int, int], ...]:
    counts: Counter[int] = Counter()
    for part in parts:
        counts[part.request] += part.run.count
    return tuple(counts.items())
