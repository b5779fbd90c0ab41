"""From the engine's thread to the asyncio thread: items for sinks, with one wake-up for many.

What it is not: a sink (`serving/stream.py`), or the loop that fills it (`serving/loop.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple, Protocol

from loong_jax.types import Emit, EmitScores, Finish, Reject

_SINKS_AT_ONCE = 8
"""Where nobody is behind: a new request waits for so many writes at each of its hops."""


class Prefilled(NamedTuple):
    """Told to a sink: a prefill step of the request was issued."""

    dop: int
    num_tokens: int
    emit: bool


class Crashed(NamedTuple):
    """Told to a sink: the engine is gone, nothing more will come."""

    message: str


SinkItem = Emit | EmitScores | Finish | Reject | Prefilled | Crashed
_BEFORE_TOKENS = frozenset((Prefilled, EmitScores))


class Sink(Protocol):
    """Where one request's output goes. Called in the asyncio thread; Finish, Reject or Crashed comes last."""

    def put(self, item: SinkItem, now_us: int) -> None: ...


class Mailbox:
    """What waits for one sink: the engine's thread adds, the asyncio thread takes, and neither waits for the other."""

    __slots__ = ("begun", "items", "queued", "sink")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.items: deque[tuple[SinkItem, int]] = deque()
        self.queued = False  # its turn will come
        self.begun = False  # its first token, or its end, has been pushed


class Outbox:
    """Sinks take turns, each with all that waits for it: who waits longer gets more at once, and wakes its stream once.
    `push` and `flush` belong to the engine's thread."""

    def __init__(self, asyncio_loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_loop = asyncio_loop
        self._first: deque[Mailbox] = deque()
        self._others: deque[Mailbox] = deque()
        self._scheduled = False

    def push(self, box: Mailbox, item: SinkItem, now_us: int) -> None:
        """What comes up to a sink's first token goes ahead of the others'."""
        box.items.append((item, now_us))
        # `_deliver` clears the flag before it looks into the box, so this item is either taken by the turn that is
        # under way, or has one to come. The same goes for `_scheduled`.
        if not box.queued:
            box.queued = True
            (self._others if box.begun else self._first).append(box)
        if not box.begun and type(item) not in _BEFORE_TOKENS:
            box.begun = True

    def flush(self) -> None:
        if (self._others or self._first) and not self._scheduled:
            self._scheduled = True
            try:
                self._asyncio_loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the asyncio loop was closed: nobody listens any more
                self._others.clear()
                self._first.clear()

    def _deliver(self) -> None:
        """A few sinks at a time: each wakes a stream that writes, and a new request should not wait for all of them.
        More, the further behind the one that has waited longest: then what a turn of the loop itself takes counts."""
        self._scheduled = False
        if not (boxes := self._first or self._others):
            return
        for _ in range(_SINKS_AT_ONCE * max(1, len(boxes[0].items))):
            box = boxes.popleft()
            box.queued = False
            put, items = box.sink.put, box.items
            while items:
                put(*items.popleft())
            if not (boxes := self._first or self._others):
                return
        if not self._scheduled:
            self._scheduled = True
            self._asyncio_loop.call_soon(self._deliver)
