"""A line for each decision of the engine that someone will ask about: why a request waits, was evicted, or refused.

It watches events and commands go by in the engine thread, as `serving/state.py` does; lines are bounded, so that a busy
server is no storm. What it is not: the log of everything that swayed a decision (`loong_jax/eventlog.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    Arrived,
    CostUpdated,
    Drain,
    Finish,
    FinishReason,
    Fork,
    Forked,
    Free,
    InstanceJoined,
    InstanceLost,
    Reject,
    RunPrefill,
    StepFailed,
    View,
)
from serving.logs import Bounded

PATIENCE_US = 1_000_000
"""A request that waits for less is no news."""
_LOOK_US = 1_000_000
_AGAIN_US = 30_000_000
"""Whoever still waits then is told of once more."""
_MOST_AT_ONCE = 5

_logger = logging.getLogger(__name__)


class DecisionLog:
    """Belongs to the engine thread."""

    def __init__(self, lines: Bounded | None = None) -> None:
        self._lines = lines or Bounded(_logger)
        self._waiting: dict[int, list[int]] = {}  # request -> since when, told next
        self._started: set[int] = set()
        self._names: dict[int, str] = {}
        self._looked_us = 0

    def arrives(self, numbers: Iterable[int], name: str) -> None:
        """These choices of a request are about to be handled; `name`: the client's."""
        for number in numbers:
            self._names[number] = name

    def saw(self, event: AnyEvent, commands: Sequence[AnyCommand], view: Callable[[], View], now_us: int) -> None:
        """An event has been handled, with these commands."""
        if isinstance(event, Arrived):
            self._waiting[event.request] = [now_us, now_us + PATIENCE_US]
        elif isinstance(event, Forked):
            self._waiting[event.child] = [now_us, now_us + PATIENCE_US]
        elif isinstance(event, StepFailed | InstanceLost | InstanceJoined | Drain | CostUpdated):
            self._saw_news(event)
        over = {command.request for command in commands if isinstance(command, Finish | Reject)}
        for command in commands:
            if isinstance(command, RunPrefill):
                for row in command.rows:
                    self._starts(row.request)
            elif isinstance(command, Fork):
                self._starts(command.child)
            elif isinstance(command, Free) and command.request in self._started and command.request not in over:
                self._evicted(command, event, now_us)
            elif isinstance(command, Finish | Reject):
                self._ended(command, now_us)
        if self._waiting and now_us - self._looked_us >= _LOOK_US:
            self._look(view, now_us)

    def _look(self, view: Callable[[], View], now_us: int) -> None:
        """Tell of whoever has waited for long, and why."""
        self._looked_us = now_us
        late = [number for number, (_, next_us) in self._waiting.items() if next_us <= now_us]
        if not late:
            return
        seen = view()
        for number in late[:_MOST_AT_ONCE]:
            since_us, _ = self._waiting[number]
            self._waiting[number][1] = now_us + _AGAIN_US
            fields = {"waited_s": round((now_us - since_us) / 1e6, 3), "waiting": len(self._waiting)}
            reason = why_waits(seen, number)
            self._lines.tell(logging.INFO, "waits", request_id=self._names.get(number), reason=reason, **fields)

    def _starts(self, request: int) -> None:
        self._waiting.pop(request, None)
        self._started.add(request)

    def _evicted(self, command: Free, event: AnyEvent, now_us: int) -> None:
        lost = isinstance(event, StepFailed | InstanceLost)
        reason = "its KV was lost with a step or an instance" if lost else "memory for others"
        self._lines.tell(
            logging.WARNING if lost else logging.INFO,
            "evicted",
            request_id=self._names.get(command.request),
            reason=reason,
            instances=list(command.instances),
        )
        if not lost:
            self._started.discard(command.request)
            self._waiting[command.request] = [now_us, now_us + PATIENCE_US]

    def _ended(self, command: Finish | Reject, now_us: int) -> None:
        name = self._names.pop(command.request, None)
        waiting = self._waiting.pop(command.request, None)
        self._started.discard(command.request)
        if isinstance(command, Reject):
            reason = command.reason.name.lower()
            self._lines.tell(logging.WARNING, "refused", request_id=name, reason=reason, message=command.message)
        elif command.reason is FinishReason.ERROR:
            self._lines.tell(logging.ERROR, "failed", request_id=name, message=command.message)
        elif waiting is not None and command.reason is FinishReason.ABORT:
            waited_s = round((now_us - waiting[0]) / 1e6, 3)
            self._lines.tell(logging.INFO, "left while waiting", request_id=name, waited_s=waited_s)

    def _saw_news(self, event: AnyEvent) -> None:
        if isinstance(event, StepFailed):
            fields = {"instances": list(event.instances), "message": event.reason}
            self._lines.tell(logging.ERROR, "step failed", step=event.step, **fields)
        elif isinstance(event, InstanceLost):
            self._lines.tell(logging.ERROR, "instance lost", instance=event.instance)
        elif isinstance(event, InstanceJoined):
            self._lines.tell(logging.INFO, "instance joined", instance=event.instance)
        elif isinstance(event, CostUpdated):
            self._lines.tell(logging.INFO, "cost model corrected")
        else:
            self._lines.tell(logging.INFO, "draining")


def why_waits(view: View, number: int) -> str:
    """The nearest reason, in words."""
    request = next((request for request in view.waiting if request.request == number), None)
    if request is None:
        return "its turn has come"
    if view.free_places <= 0:
        return "as many requests run as may"
    alive = [instance for instance in view.instances if instance.alive]
    if not alive:
        return "no instance is there"
    needed = -(-(request.prompt_len + 1) // view.page_tokens)
    free = sum(instance.free_pages for instance in alive)
    if needed > free:
        return f"its prompt needs {needed} pages, {free} are free"
    if all(instance.queued >= 2 or instance.prefilling for instance in alive):
        return "all instances are busy with steps issued before"
    return "the policy lets others go before it"
