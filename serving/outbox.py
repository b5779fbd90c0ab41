"""From the engine's thread to the asyncio thread: items for sinks, with one wake-up for many.

What it is not: a sink (`serving/stream.py`), or the loop that fills it (`serving/loop.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple, Protocol

from loong_jax.types import Emit, EmitScores, Finish, Reject

_DELIVERED_AT_ONCE = 32


class Prefilled(NamedTuple):
    """Told to a sink: a prefill step of the request was issued."""

    dop: int
    num_tokens: int
    emit: bool


class Crashed(NamedTuple):
    """Told to a sink: the engine is gone, nothing more will come."""

    message: str


SinkItem = Emit | EmitScores | Finish | Reject | Prefilled | Crashed


class Sink(Protocol):
    """Where one request's output goes. Called in the asyncio thread; Finish, Reject or Crashed comes last."""

    def put(self, item: SinkItem, now_us: int) -> None: ...


class Outbox:
    """`push` and `flush` belong to the engine's thread."""

    def __init__(self, asyncio_loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_loop = asyncio_loop
        self._items: deque[tuple[Sink, SinkItem, int]] = deque()
        self._first: deque[tuple[Sink, SinkItem, int]] = deque()
        self._scheduled = False

    def push(self, sink: Sink, item: SinkItem, now_us: int, *, first: bool = False) -> None:
        """`first`: nothing for this sink is waiting among the others, which it may pass."""
        (self._first if first else self._items).append((sink, item, now_us))

    def flush(self) -> None:
        # `_deliver` clears the flag before it looks into the deques, so an item pushed before this line is either taken
        # by a running delivery or by the one scheduled here.
        if (self._items or self._first) and not self._scheduled:
            self._scheduled = True
            try:
                self._asyncio_loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the asyncio loop was closed: nobody listens any more
                self._items.clear()
                self._first.clear()

    def _deliver(self) -> None:
        """A few at a time: each wakes a stream that writes, and a new request should not wait for all of them."""
        self._scheduled = False
        for _ in range(_DELIVERED_AT_ONCE):
            if not (items := self._first or self._items):
                return
            sink, item, now_us = items.popleft()
            sink.put(item, now_us)
        if not self._scheduled:
            self._scheduled = True
            self._asyncio_loop.call_soon(self._deliver)
