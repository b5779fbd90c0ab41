"""Running account of the elastic state, from the events and commands the loop sees: groups, DoP, tokens, KV moved.

Lives in the engine thread and must stay cheap: a decode step costs it a few dictionary look-ups per row. What it is
not: a source for decisions (that is the manager's View).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    Arrived,
    CostUpdated,
    DecodeRow,
    Drain,
    Emit,
    Finish,
    Fork,
    Forked,
    Free,
    InstanceLost,
    Migrate,
    Phase,
    Program,
    ProgramReady,
    Reject,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
    View,
)
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.step_times import StepTimes

_WINDOW_US = 1_000_000
_PHASES = {Phase.PREFILL: pb.PHASE_PREFILL, Phase.DECODE: pb.PHASE_DECODE}
_GroupKey = tuple[pb.Phase, tuple[int, ...]]  # phase, instances


class _Group:
    """What one set of instances does in one phase; tokens are counted in windows of about a second."""

    __slots__ = ("in_flight", "last_us", "num_requests", "rate", "rows", "window_start_us", "window_tokens")

    def __init__(self, now_us: int) -> None:
        self.in_flight = 0
        self.num_requests = 0
        self.rows: tuple[DecodeRow, ...] = ()  # of the newest decode step
        self.window_start_us = now_us
        self.window_tokens = 0
        self.rate = 0.0
        self.last_us = now_us

    def step_done(self, num_tokens: int, now_us: int) -> None:
        self.in_flight -= 1
        self.window_tokens += num_tokens
        self.last_us = now_us
        elapsed_us = now_us - self.window_start_us
        if elapsed_us >= _WINDOW_US or self.rate == 0.0:
            self.rate = self.window_tokens * 1e6 / max(elapsed_us, 1)
            if elapsed_us >= _WINDOW_US:
                self.window_start_us, self.window_tokens = now_us, 0


class EngineState:
    """`kv_token_bytes`: KV of one token over all layers. `compiles_after_ready`: asked at each snapshot. `step_times`:
    compares predictions, where there is a cost model."""

    def __init__(
        self,
        *,
        kv_token_bytes: int,
        compiles_after_ready: Callable[[], int],
        step_times: StepTimes | None = None,
    ) -> None:
        self._kv_token_bytes = kv_token_bytes
        self._step_times = step_times
        self._missing: set[tuple[Program, tuple[int, ...]]] | None = None
        self._compiles_after_ready = compiles_after_ready
        self._num_programs = 0
        self._draining = False
        self._loses = False  # the newest event took KV away
        self._waiting: set[int] = set()
        self._group_of: dict[int, tuple[int, ...]] = {}  # running request -> instances of its newest step
        self._steps: dict[int, tuple[_GroupKey, int]] = {}  # step in flight -> group, tokens
        self.steps_over = 0
        """Steps that ended, also by a failure."""
        self._groups: dict[_GroupKey, _Group] = {}  # all there ever were: as many as there are sets of instances
        self._owner: dict[int, _GroupKey] = {}  # instance -> group of its newest step
        self._counters = pb.Counters()
        self._scale_ups = self._scale_downs = self._steps_decode = self._tokens_generated = 0

    def wait_for(self, needed: Iterable[tuple[Program, tuple[int, ...]]]) -> None:
        """Be ready once these programs are, each on its set of instances. Before the first event."""
        self._missing = set(needed)

    @property
    def ready(self) -> bool:
        return self._missing is not None and not self._missing

    @property
    def steps_in_flight(self) -> int:
        return len(self._steps)

    # ------------------------------------------------------------------------------------------------- the tape

    def saw_event(self, event: AnyEvent, now_us: int) -> None:
        if self._step_times is not None:
            self._step_times.saw_event(event, now_us)
        self._loses = isinstance(event, StepFailed | InstanceLost)
        if isinstance(event, StepDone):
            self._step_over(event.step, now_us)
        elif isinstance(event, Arrived):
            self._waiting.add(event.request)
        elif isinstance(event, Forked):
            self._waiting.add(event.child)
        elif isinstance(event, ProgramReady):
            self._num_programs += 1
            if self._missing:
                self._missing.discard((event.program, event.instances))
        elif isinstance(event, StepFailed):
            self._counters.steps_failed += 1
            self._instances_lost(frozenset(event.instances), now_us)
        elif isinstance(event, Drain):
            self._draining = True

    def cost_update(self, now_us: int) -> CostUpdated | None:
        """An event that corrects the cost model, now and then."""
        return None if self._step_times is None else self._step_times.cost_update(now_us)

    def saw_command(self, command: AnyCommand, now_us: int) -> None:
        if self._step_times is not None:
            self._step_times.saw_command(command, now_us)
        if isinstance(command, Emit):
            self._tokens_generated += len(command.tokens)
        elif isinstance(command, RunDecode):
            self._steps_decode += 1
            requests = [row.request for row in command.rows]
            group = self._step_issued(pb.PHASE_DECODE, command.step, command.instances, requests, len(requests), now_us)
            group.rows = command.rows
        elif isinstance(command, RunPrefill):
            self._saw_prefill(command, now_us)
        elif isinstance(command, Migrate):
            self._counters.kv_bytes_migrated += self._kv_token_bytes * sum(move.run.count for move in command.moves)
        elif isinstance(command, Free):
            self._saw_free(command.request)
        elif isinstance(command, Fork):  # it may never be prefilled
            self._waiting.discard(command.child)
        elif isinstance(command, Finish | Reject):
            self._waiting.discard(command.request)
            self._group_of.pop(command.request, None)
            if isinstance(command, Finish):
                self._counters.requests_finished += 1
            else:
                self._counters.requests_refused += 1

    def _saw_free(self, request: int) -> None:
        """KV that goes while its request goes on."""
        if request not in self._group_of:
            return
        if self._loses:
            self._counters.evictions_by_loss += 1
        else:
            self._counters.evictions += 1
            del self._group_of[request]
            self._waiting.add(request)

    def _saw_prefill(self, command: RunPrefill, now_us: int) -> None:
        requests = [row.request for row in command.rows]
        num_tokens = sum(run.count for row in command.rows for run in row.runs)
        self._counters.steps_prefill += 1
        self._counters.tokens_prefilled += num_tokens
        self._counters.kv_bytes_rehomed += self._kv_token_bytes * sum(move.run.count for move in command.moves)
        self._waiting.difference_update(requests)
        self._step_issued(pb.PHASE_PREFILL, command.step, command.instances, requests, num_tokens, now_us)

    def _step_issued(
        self,
        phase: pb.Phase,
        step: int,
        instances: tuple[int, ...],
        requests: list[int],
        num_tokens: int,
        now_us: int,
    ) -> _Group:
        key = (phase, instances)
        group = self._groups.get(key)
        if group is None or (group.in_flight == 0 and now_us - group.last_us > _WINDOW_US):
            group = self._groups[key] = _Group(now_us)
        group.in_flight += 1
        group.num_requests = len(requests)
        self._steps[step] = (key, num_tokens)
        for instance in instances:
            self._owner[instance] = key
        self._count_scaling(instances, requests)
        return group

    def _count_scaling(self, instances: tuple[int, ...], requests: list[int]) -> None:
        """A batch that comes together from two groups counts once for each of them."""
        group_of = self._group_of
        previous = {group_of.get(request, instances) for request in requests}
        if previous != {instances}:
            dop = len(instances)
            self._scale_ups += sum(len(group) < dop for group in previous)
            self._scale_downs += sum(len(group) > dop for group in previous)
        for request in requests:
            group_of[request] = instances

    def _step_over(self, step: int, now_us: int) -> None:
        known = self._steps.pop(step, None)
        if known is None:
            return
        self.steps_over += 1
        key, num_tokens = known
        self._groups[key].step_done(num_tokens, now_us)

    def _instances_lost(self, lost: frozenset[int], now_us: int) -> None:
        for step in [step for step, (key, _) in self._steps.items() if not lost.isdisjoint(key[1])]:
            self._step_over(step, now_us)

    def _is_current(self, key: _GroupKey, now_us: int) -> bool:
        """Has steps in flight, or had some just now and its instances have not gone on to others."""
        group = self._groups[key]
        if group.in_flight > 0:
            return True
        return now_us - group.last_us < _WINDOW_US and all(self._owner[instance] == key for instance in key[1])

    # ------------------------------------------------------------------------------------------------ snapshot

    def snapshot(self, view: View, now_us: int) -> pb.State:
        counters = pb.Counters()
        counters.CopyFrom(self._counters)
        counters.scale_ups = self._scale_ups
        counters.scale_downs = self._scale_downs
        counters.steps_decode = self._steps_decode
        counters.tokens_generated = self._tokens_generated
        counters.engine_cpu_us = time.thread_time_ns() // 1000
        counters.compiles_after_ready = self._compiles_after_ready()
        predictions: list[pb.Prediction] = []
        if self._step_times is not None:
            counters.cost_refits = self._step_times.num_refits
            predictions = [
                pb.Prediction(phase=_PHASES[seen.phase], steps=seen.num_steps, error=seen.error, bias=seen.bias)
                for seen in self._step_times.phase_errors()
            ]
        groups = [
            pb.Group(
                phase=phase,
                dop=len(instances),
                instances=instances,
                requests=group.num_requests,
                tokens_per_s=group.rate,
                masters=len({row.master for row in group.rows}),
            )
            for (phase, instances), group in sorted(self._groups.items(), key=lambda item: item[0][1])
            if self._is_current((phase, instances), now_us)
        ]
        return pb.State(
            now_us=now_us,
            ready=self.ready,
            draining=self._draining,
            groups=groups,
            instances=[
                pb.Instance(
                    index=instance.instance,
                    pages_used=instance.num_pages - instance.free_pages,
                    pages_total=instance.num_pages,
                    alive=instance.alive,
                )
                for instance in view.instances
            ],
            counters=counters,
            requests_running=len(self._group_of),
            requests_waiting=len(self._waiting),
            programs_ready=self._num_programs,
            predictions=predictions,
        )
