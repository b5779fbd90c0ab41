"""An engine that costs next to nothing: each step gives every running request one token, at a pace.

Its first token comes with the arrival, so all of a client's time to first token is the shell's. The loop, its thread
and its account are the real ones. What it is not: `tests/support/fake_engine.py`, which proves and does not hurry, or a
manager with pages (`bench_cancel.py` has the real one).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    DecodeRow,
    Drain,
    Emit,
    Finish,
    FinishReason,
    Phase,
    Program,
    ProgramReady,
    Reject,
    RejectReason,
    Run,
    RunDecode,
    StepDone,
    Stopped,
    View,
)

NEEDED = ((Program(Phase.DECODE, 1, 1), (0,)),)
_LOGPROB = (-0.5,)


class _Running:
    __slots__ = ("index", "left", "number", "row")

    def __init__(self, event: Arrived) -> None:
        self.number, self.index, self.left = event.request, 0, event.max_tokens
        self.row = DecodeRow(event.request, 0, 0, -1, 0, 0, Run(0, 1), event.sampling)


class _View:
    """All that a snapshot asks for."""

    instances = ()


class PacedManager:
    """`max_running` requests get a token a step, `max_waiting` more wait, others are refused."""

    def __init__(self, max_running: int, max_waiting: int, answer: Sequence[int]) -> None:
        """`answer`: the tokens that everybody gets, again and again."""
        self._max_running, self._max_waiting = max_running, max_waiting
        self._tokens = tuple((token,) for token in answer)
        self._running: dict[int, _Running] = {}
        self._waiting: deque[Arrived] = deque()
        self._rows: tuple[DecodeRow, ...] | None = ()
        self._num_steps = 0
        self._in_step = False
        self._draining = False

    @property
    def num_open(self) -> int:
        return len(self._running) + len(self._waiting)

    def handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]:
        out: list[AnyCommand] = []
        if isinstance(event, StepDone):
            self._in_step = False
            for request in list(self._running.values()):
                self._emit(request, out)
        elif isinstance(event, Arrived):
            self._arrived(event, out)
        elif isinstance(event, Aborted):
            self._end(event.request, FinishReason.ABORT, out)
        elif isinstance(event, Stopped):
            self._end(event.request, FinishReason.STOP, out)
        elif isinstance(event, Drain):
            self._draining = True
        while self._waiting and len(self._running) < self._max_running:
            self._start(self._waiting.popleft(), out)
        if self._running and not self._in_step:
            out.append(self._step())
        return out

    def view(self) -> View:
        return _View()  # type: ignore[return-value]

    def _arrived(self, event: Arrived, out: list[AnyCommand]) -> None:
        if self._draining:
            out.append(Reject(event.request, RejectReason.DRAINING, "the server is draining"))
        elif len(self._running) < self._max_running:
            self._start(event, out)
        elif len(self._waiting) < self._max_waiting:
            self._waiting.append(event)
        else:
            out.append(Reject(event.request, RejectReason.QUEUE_FULL, f"{self._max_waiting} requests wait"))

    def _start(self, event: Arrived, out: list[AnyCommand]) -> None:
        request = self._running[event.request] = _Running(event)
        self._rows = None
        self._emit(request, out)

    def _emit(self, request: _Running, out: list[AnyCommand]) -> None:
        token = self._tokens[request.index % len(self._tokens)]
        out.append(Emit(request.number, request.index, token, _LOGPROB, 1))
        request.index += 1
        request.left -= 1
        if not request.left:
            self._end(request.number, FinishReason.LENGTH, out)

    def _end(self, number: int, reason: FinishReason, out: list[AnyCommand]) -> None:
        request = self._running.pop(number, None)
        if request is not None:
            self._rows = None
            out.append(Finish(number, reason, request.index))
            return
        for event in self._waiting:
            if event.request == number:
                self._waiting.remove(event)
                out.append(Finish(number, reason, 0))
                return

    def _step(self) -> RunDecode:
        if self._rows is None:
            self._rows = tuple(request.row for request in self._running.values())
        self._num_steps += 1
        self._in_step = True
        return RunDecode(self._num_steps, (0,), 8, self._rows)


class PacedExecutor:
    """Answers a step `step_s` after the one before it, or at once when it comes late."""

    def __init__(self, post: Callable[[AnyEvent], None], step_s: float) -> None:
        self.step_s = step_s
        self._post = post
        self._steps: queue.SimpleQueue[RunDecode | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer, name="paced-executor", daemon=True)
        self._thread.start()
        for program, instances in NEEDED:
            post(ProgramReady(program, instances))

    def submit(self, command: AnyCommand) -> None:
        if isinstance(command, RunDecode):
            self._steps.put(command)

    def close(self) -> None:
        self._steps.put(None)
        self._thread.join(5)

    def _answer(self) -> None:
        due_s = time.monotonic()
        while (command := self._steps.get()) is not None:
            due_s = max(time.monotonic(), due_s + self.step_s) if self.step_s else 0.0
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            self._post(StepDone(command.step))
