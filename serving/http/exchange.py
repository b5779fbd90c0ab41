"""One exchange over HTTP whose work may take long: a body in, an answer or events out, and a client that may leave.

What it is not: the routes (`serving/http/app.py`) or what is in the answers (`serving/http/answers.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from serving.errors import EngineFailed, Refusal, SlowReader
from serving.http import errors
from serving.http.errors import LargeBody, ManyBodies, SlowBody, WrongContentType

Headers = Sequence[tuple[bytes, bytes]]
_JSON = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client left, or takes nothing: nobody is there to be answered."""


class Bodies:
    """Receives bodies, within bounds of one and of all that are under way."""

    def __init__(self, *, max_bytes: int, max_total_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._timeout_s = timeout_s
        self._total_bytes = 0

    async def receive(self, request: Request) -> bytes:
        """Raises HttpRefusal, ClientGone."""
        # A page in a browser may send other types to any host without asking first.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise WrongContentType("content-type: must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise WrongContentType("content-encoding: compressed bodies are not taken")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise LargeBody(f"the body has more than {self._max_bytes} bytes")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._receive(request)
        except TimeoutError:
            raise SlowBody(f"the body took more than {self._timeout_s:g} s") from None
        except ClientDisconnect:
            raise ClientGone from None

    async def _receive(self, request: Request) -> bytes:
        data = bytearray()
        try:
            async for chunk in request.stream():
                data += chunk
                self._total_bytes += len(chunk)
                if len(data) > self._max_bytes:
                    raise LargeBody(f"the body has more than {self._max_bytes} bytes")
                if self._total_bytes > self._max_total_bytes:
                    raise ManyBodies(f"bodies of more than {self._max_total_bytes} bytes are being received")
        finally:
            self._total_bytes -= len(data)
        return bytes(data)


class Out:
    """The way to the client: one whole answer, or events. Raises ClientGone when it takes nothing for too long."""

    def __init__(self, send: Send, headers: Headers, write_timeout_s: float) -> None:
        self._send = send
        self._headers = headers
        self._write_timeout_s = write_timeout_s
        self._streams = False

    async def whole(self, data: bytes, status: int = 200, headers: Headers = ()) -> None:
        length = (b"content-length", str(len(data)).encode())
        await self._start(status, (_JSON, length, *headers))
        await self._write(data, more=False)

    async def event(self, *datas: bytes) -> None:
        """Server-sent events."""
        if not datas:
            return
        if not self._streams:
            self._streams = True
            # The last is for proxies that would gather events.
            kinds = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
            await self._start(200, (*kinds, (b"x-accel-buffering", b"no")))
        await self._write(b"".join(b"data: " + data + b"\n\n" for data in datas), more=True)

    async def done(self) -> None:
        """The end of the events."""
        await self.event(b"[DONE]")
        await self._write(b"", more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """As an answer or, after events have been sent, as one more."""
        data = errors.encoded(refusal)
        if not self._streams:
            return await self.whole(data, errors.status(refusal), errors.headers(refusal))
        await self.event(data)
        await self.done()

    async def _start(self, status: int, headers: Headers) -> None:
        message = {"type": "http.response.start", "status": status, "headers": [*self._headers, *headers]}
        await self._send(message)

    async def _write(self, data: bytes, *, more: bool) -> None:
        """Returns when the connection has taken it: what the client does not read holds this back."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGone from None


class Exchange:
    """A response of Starlette's kind: does `work` with the way out, and gives up when the client leaves."""

    def __init__(self, work: Callable[[Out], Awaitable[None]], headers: Headers, write_timeout_s: float) -> None:
        self._work = work
        self._headers = headers
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = Out(send, self._headers, self._write_timeout_s)
        working = asyncio.ensure_future(self._answer(out))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        except ClientGone:
            pass
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _answer(self, out: Out) -> None:
        try:
            await self._work(out)
        except SlowReader:
            raise ClientGone from None
        except Refusal as refusal:
            await out.refuse(refusal)
        except (ClientGone, OSError):
            raise ClientGone from None
        except Exception:
            await out.refuse(EngineFailed("the server failed"))
            raise


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def together(works: Sequence[Awaitable[None]]) -> None:
    """All of them at once; the first error ends the others, and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event_data(frame: object) -> bytes:
    return msgspec.json.encode(frame)
