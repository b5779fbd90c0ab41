"""How much clients may make the server hold: streams open at once, and tokens that a client does not take.

A client that reads more slowly than the engine generates gets more tokens a message; one that takes nothing is cut off,
which frees its pages. What it is not: the queue of requests (the manager's `Reject`), or the flow control of a
connection, which is the transport's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from serving.errors import SlowReader
from serving.stream import RequestStream

_MIN_UNTAKEN_S = 1.0
"""Many unread tokens say nothing about a client whose last message has only just been given to its connection."""


class StreamLimits(msgspec.Struct, frozen=True):
    """Of all listeners together. `max_unread_tokens` and `write_timeout_s` are of one request."""

    max_streams: int = 8192
    max_unread_tokens: int = 2048
    write_timeout_s: float = 30.0


class Patience:
    """Watches one request's writes. A write that waits costs two assignments, not a timer."""

    def __init__(self, limits: StreamLimits, streams: Sequence[RequestStream], timeout: asyncio.Timeout) -> None:
        self._limits = limits
        self._streams = streams
        self._timeout = timeout
        self._asyncio_loop = asyncio.get_running_loop()
        self._since_s: float | None = None
        self._timer = self._asyncio_loop.call_later(limits.write_timeout_s, self._look)
        self.reason = ""

    def began(self) -> None:
        """A message is given to the connection."""
        self._since_s = self._asyncio_loop.time()

    def ended(self) -> None:
        """The connection has taken it."""
        self._since_s = None

    def tokens_came(self) -> None:
        """More may be unread now."""
        if self._since_s is None:
            return
        num_unread = sum(stream.num_unread for stream in self._streams)
        untaken_s = self._asyncio_loop.time() - self._since_s
        if num_unread > self._limits.max_unread_tokens and untaken_s >= _MIN_UNTAKEN_S:
            self._cut(f"{num_unread} tokens wait for a client that has read nothing for {untaken_s:.1f} s")

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now_s, limit_s = self._asyncio_loop.time(), self._limits.write_timeout_s
        since_s = now_s if self._since_s is None else self._since_s
        if now_s - since_s >= limit_s:
            self._cut(f"the client has read nothing for {now_s - since_s:.1f} s")
        else:
            self._timer = self._asyncio_loop.call_at(since_s + limit_s, self._look)

    def _cut(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self._timeout.reschedule(self._asyncio_loop.time())


@asynccontextmanager
async def patient(limits: StreamLimits, streams: Sequence[RequestStream]) -> AsyncIterator[Patience]:
    """Ends what is done inside when the client takes nothing. Raises SlowReader."""
    patience = None
    try:
        async with asyncio.timeout(None) as timeout:
            patience = Patience(limits, streams, timeout)
            for stream in streams:
                stream.on_unread, stream.few_unread = patience.tokens_came, limits.max_unread_tokens // len(streams)
            yield patience
    except TimeoutError:
        if patience is None or not patience.reason:
            raise
        raise SlowReader(patience.reason) from None
    finally:
        if patience is not None:
            patience.close()
