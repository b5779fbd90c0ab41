"""The live loop: one thread, the only one to call `manager.handle` and `executor.submit` (DESIGN 3).

Events come in through a bounded inbox: arrivals and aborts from clients, completions from the executor (`post`).
Commands that concern devices go to the executor; Emit, Finish and Reject go to the request's sink, in the asyncio
thread, one wake-up for all that happened meanwhile. What it is not: a decision maker (`loong_jax/manager.py`) or a
text processor (`serving/stream.py`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from loong_jax.types import (
    Aborted,
    Adjustment,
    AnyCommand,
    AnyEvent,
    Arrived,
    Drain,
    Emit,
    EmitScores,
    Finish,
    Fork,
    Forked,
    Program,
    Reject,
    RejectReason,
    RunPrefill,
    Sampling,
    Stopped,
    Tick,
    View,
)
from serving.errors import EngineFailed, NotServing, QueueFull
from serving.outbox import Crashed, Mailbox, Outbox, Prefilled, Sink
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.state import EngineState

_log = logging.getLogger(__name__)

_TICK_S = 0.1
"""A quiet engine with requests is woken this often: ageing and reservations end by the clock."""


class ManagerLike(Protocol):
    def handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]: ...
    def view(self) -> View: ...


class ExecutorLike(Protocol):
    """Never blocks on devices; answers through `EngineLoop.post`."""

    def submit(self, command: AnyCommand) -> None: ...
    def close(self) -> None: ...


class EventLog(Protocol):
    def write(self, now_us: int, event: AnyEvent, commands: Iterable[AnyCommand]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Decisions(Protocol):
    """Told of what is decided, in the engine thread."""

    def arrives(self, numbers: Iterable[int], name: str) -> None: ...
    def saw(self, event: AnyEvent, commands: Sequence[AnyCommand], view: Callable[[], View], now_us: int) -> None: ...


class Progress(NamedTuple):
    """What the engine has done so far. `busy`: something lies before the engine thread; `in_flight`: steps that the
    devices have not answered."""

    handled: int
    busy: bool
    steps_over: int
    in_flight: int


class _Arrival(NamedTuple):
    """A request and the other choices of it: handled one after the other, with no event between them."""

    events: tuple[Arrived | Forked, ...]
    sinks: tuple[Sink, ...]
    name: str

    @property
    def numbers(self) -> list[int]:
        return [event.request if isinstance(event, Arrived) else event.child for event in self.events]


class _Question(NamedTuple):
    answer: Future[pb.State]


_CLOSE = object()


class EngineLoop:
    """Runs a manager and an executor. All public methods may be called from any thread."""

    def __init__(
        self,
        manager: ManagerLike,
        state: EngineState,
        *,
        event_log: EventLog | None = None,
        decisions: Decisions | None = None,
        max_inbox: int = 4096,
        on_ready: Callable[[], None] = lambda: None,
        on_crash: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`on_ready` and `on_crash` are called at most once each, in the engine thread."""
        self._manager = manager
        self._state = state
        self._event_log = event_log
        self._decisions = decisions
        self._max_inbox = max_inbox
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._boxes: dict[int, Mailbox] = {}  # of unfinished requests
        self._lock = threading.Lock()  # request ids enter the inbox in their order
        self._next_request = 0
        self._crash: str | None = None
        self._full: str | None = None
        self._ready_told = False
        self._handled = 0
        self._handling = False
        self._start_ns = time.monotonic_ns()
        self._thread = threading.Thread(target=self._run, name="loong-engine", daemon=True)

    # ---------------------------------------------------------------------------------------------- any thread

    def start(
        self,
        executor: ExecutorLike,
        needed: Iterable[tuple[Program, tuple[int, ...]]],
        asyncio_loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Start the thread, which closes the executor at its end. Readiness waits for the programs `needed`; sinks will
        be called in `asyncio_loop`."""
        self._executor = executor
        self._state.wait_for(needed)
        self._outbox = Outbox(asyncio_loop)
        self._thread.start()

    def post(self, event: AnyEvent) -> None:
        """Take an event of the executor, also before `start`. Never refused: an executor has at most two steps per
        instance under way."""
        self._inbox.put(event)

    def now_us(self) -> int:
        """The clock that events are handled by, and sinks are told."""
        return (time.monotonic_ns() - self._start_ns) // 1000

    def arrive(
        self,
        prompt: bytes,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        sink: Sink,
        *,
        adjustment: Adjustment | None = None,
        num_prompt_top: int | None = None,
        choices: Sequence[tuple[Sampling, Sink]] = (),
        name: str = "",
    ) -> int:
        """Hand in a request, `name` in the log, and return its number; `choices` are further answers to its prompt,
        with the numbers that follow. Raises a Refusal."""
        with self._lock:
            self._check_alive()
            if self._inbox.qsize() >= self._max_inbox:
                raise QueueFull(f"the engine has {self._max_inbox} events to handle")
            request = self._next_request
            self._next_request += 1 + len(choices)
            arrived = Arrived(request, prompt, max_tokens, sampling, stop_ids, adjustment, num_prompt_top)
            forks = tuple(
                Forked(request, child, max_tokens, choice, stop_ids, adjustment, len(prompt) // 4)
                for child, (choice, _) in enumerate(choices, request + 1)
            )
            self._inbox.put(_Arrival((arrived, *forks), (sink, *(sink for _, sink in choices)), name))
            return request

    @property
    def full(self) -> str | None:
        """The manager's words while its queue has no room: since it last refused for that, nobody has left the queue.
        Whoever asks here first spares both threads an arrival that would be refused."""
        return self._full

    def abort(self, request: int) -> None:
        """End a request wherever it is; no effect when it is over."""
        self._inbox.put(Aborted(request))

    def stop_at(self, request: int, num_generated: int) -> None:
        """Finish a request whose text ended with its token `num_generated`; no effect when it is over."""
        self._inbox.put(Stopped(request, num_generated))

    def drain(self) -> None:
        """Refuse new requests from now on; the others go on."""
        self._inbox.put(Drain())

    def ask_state(self) -> Future[pb.State]:
        """The elastic state, taken between two events. Raises a Refusal."""
        self._check_alive()
        answer: Future[pb.State] = Future()
        self._inbox.put(_Question(answer))
        return answer

    def progress(self) -> Progress:
        """Read without a lock: each number is right, together they may be of two moments."""
        runs = self._thread.is_alive()
        busy = runs and (self._handling or not self._inbox.empty())
        return Progress(self._handled, busy, self._state.steps_over, self._state.steps_in_flight if runs else 0)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread, after the events posted so far. Requests still running end as crashed."""
        if self._thread.ident is not None:
            self._inbox.put(_CLOSE)
            self._thread.join(timeout_s)
        elif self._event_log is not None:
            self._event_log.close()

    def _check_alive(self) -> None:
        if self._thread.ident is None:
            raise NotServing("the engine is loading")
        if self._crash is not None:
            raise EngineFailed(self._crash)

    # ------------------------------------------------------------------------------------------- engine thread

    def _run(self) -> None:
        try:
            self._serve()
            message = "the server has stopped"
        except BaseException as error:
            _log.exception("the engine thread ends")
            message = f"the engine failed: {type(error).__name__}: {error}"
        try:
            self._end(message)
        finally:
            if self._event_log is not None:
                self._event_log.close()
            self._executor.close()

    def _serve(self) -> None:
        while (item := self._next_item()) is not _CLOSE:
            self._handling = True
            self._serve_item(item, self.now_us())
            self._handled += 1
            self._handling = False

    def _serve_item(self, item: Any, now_us: int) -> None:
        if type(item) is _Question:
            return self._answer(item.answer, now_us)
        if type(item) is _Arrival:
            self._boxes.update(zip(item.numbers, map(Mailbox, item.sinks), strict=True))
            if self._decisions:
                self._decisions.arrives(item.numbers, item.name)
            for event in item.events:
                self._take(event, now_us)
        else:
            self._take(item, now_us)
            update = self._state.cost_update(now_us)
            if update is not None:
                self._take(update, now_us)
        if not self._ready_told and self._state.ready:
            self._ready_told = True
            self._on_ready()

    def _take(self, event: AnyEvent, now_us: int) -> None:
        self._state.saw_event(event, now_us)
        commands = self._handle(event, now_us)
        if self._decisions is not None:
            self._decisions.saw(event, commands, self._manager.view, now_us)
        for command in commands:
            self._perform(command, now_us)
        self._outbox.flush()
        if self._event_log is not None:
            self._event_log.write(now_us, event, commands)

    def _handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]:
        try:
            return self._manager.handle(event, now_us)
        except Exception:
            if self._event_log is not None:  # so that a replay stops at the same event
                self._event_log.write(now_us, event, ())
            raise

    def _next_item(self) -> Any:
        """Wait for the next item. Time itself is an event while requests are open."""
        if self._event_log is not None and not self._boxes and self._inbox.empty():
            self._event_log.flush()
        try:
            return self._inbox.get(timeout=_TICK_S if self._boxes else None)
        except queue.Empty:
            return Tick()

    def _answer(self, answer: Future[pb.State], now_us: int) -> None:
        if not answer.set_running_or_notify_cancel():  # whoever asked has gone
            return
        try:
            answer.set_result(self._state.snapshot(self._manager.view(), now_us))
        except Exception as error:  # an operator's question never ends the service
            answer.set_exception(error)

    def _perform(self, command: AnyCommand, now_us: int) -> None:
        # Once a token, so types are compared: `isinstance` of several takes as long as all the rest.
        if type(command) is Emit or type(command) is EmitScores:
            if (box := self._boxes.get(command.request)) is not None:
                self._outbox.push(box, command, now_us)
        elif type(command) is Finish or type(command) is Reject:
            refused_for_room = type(command) is Reject and command.reason is RejectReason.QUEUE_FULL
            self._full = command.message if refused_for_room else None
            if (box := self._boxes.pop(command.request, None)) is not None:
                self._outbox.push(box, command, now_us)
        else:
            self._executor.submit(command)
            if isinstance(command, RunPrefill | Fork):  # somebody has left the queue
                self._full = None
            if isinstance(command, RunPrefill):
                self._tell_prefilled(command, now_us)
        self._state.saw_command(command, now_us)

    def _tell_prefilled(self, command: RunPrefill, now_us: int) -> None:
        for row in command.rows:
            box = self._boxes.get(row.request)
            if box is not None:
                num_tokens = sum(run.count for run in row.runs)
                self._outbox.push(box, Prefilled(len(command.instances), num_tokens, row.emit), now_us)

    def _end(self, message: str) -> None:
        """Nothing more will come: tell everybody who waits."""
        with self._lock:  # no arrival enters the inbox after this
            self._crash = message
        now_us = self.now_us()
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if type(item) is _Arrival:
                self._boxes.update(zip(item.numbers, map(Mailbox, item.sinks), strict=True))
            elif type(item) is _Question and item.answer.set_running_or_notify_cancel():
                item.answer.set_exception(EngineFailed(message))
        for box in self._boxes.values():
            self._outbox.push(box, Crashed(message), now_us)
        self._boxes.clear()
        self._outbox.flush()
        self._on_crash(message)
