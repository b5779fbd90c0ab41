"""A gRPC client of bare frames: thousands of streams and connections at a microsecond or two a message, and the rude
things that a real client cannot be made to do (windows of no bytes, halves of frames, resets).

It sends headers without compression and asks for the same, so that a status can be found without HPACK. What it is
not: a client to copy, or a check of HTTP/2.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4
MAX_WINDOW = 2**31 - 1
_READ_BYTES = 256 * 1024


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(window_bytes: int) -> bytes:
    """Opens a connection: no dynamic table, and streams of this window on a connection without bounds."""
    values = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, window_bytes)
    update = struct.pack(">I", MAX_WINDOW - 65_535)
    return _PREFACE + frame(SETTINGS, 0, 0, values) + frame(WINDOW_UPDATE, 0, 0, update)


def request(stream: int, path: str, message: bytes, *, timeout: str = "", end: bool = True) -> bytes:
    """A unary call's frames. `timeout` as in "250m". `end` False: as if more were to come."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    fields += [("grpc-timeout", timeout)] if timeout else []
    block = b"".join(_literal(name) + _literal(value, first=b"") for name, value in fields)
    body = b"\0" + struct.pack(">I", len(message)) + message
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM if end else 0, stream, body)


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def _literal(text: str, first: bytes = b"\0") -> bytes:
    """Not indexed, not compressed; a length of less than 127."""
    return first + bytes([len(text)]) + text.encode()


class Stream:
    """One call: what has come of it. `on_message` gets the bytes of each."""

    __slots__ = ("ended_s", "first_s", "hint_ms", "number", "num_messages", "on_message", "rest", "sent_s", "status")

    def __init__(self, number: int, on_message: Callable[[bytes], None] | None = None) -> None:
        self.number = number
        self.on_message = on_message
        self.rest = b""
        self.num_messages = 0
        self.status: str | None = None
        self.hint_ms: str | None = None
        self.sent_s = time.monotonic()
        self.first_s = self.ended_s = 0.0

    def take(self, data: bytes) -> None:
        if self.rest:
            data = self.rest + data
        at, end = 0, len(data)
        while end - at >= 5:
            size = int.from_bytes(data[at + 1 : at + 5], "big")
            if end - at < 5 + size:
                break
            if not self.num_messages:
                self.first_s = time.monotonic()
            self.num_messages += 1
            if self.on_message is not None:
                self.on_message(data[at + 5 : at + 5 + size])
            at += 5 + size
        self.rest = data[at:]

    def take_headers(self, block: bytes) -> None:
        self.status = _field(block, b"grpc-status") or self.status
        self.hint_ms = _field(block, b"grpc-retry-pushback-ms") or self.hint_ms


def _field(block: bytes, name: bytes) -> str | None:
    at = block.find(name)
    if at < 0:
        return None
    at += len(name)
    return block[at + 1 : at + 1 + block[at]].decode()


class Connection:
    """One connection, without a thread of its own: `Poller` gives it what comes."""

    def __init__(self, port: int, *, window_bytes: int = MAX_WINDOW, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(settings(window_bytes))
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.on_end: Callable[[Stream], None] = lambda stream: None
        self._rest = b""
        self._next = 1

    def call(
        self,
        path: str,
        message: bytes,
        on_message: Callable[[bytes], None] | None = None,
        timeout: str = "",
        *,
        end: bool = True,
    ) -> Stream:
        stream = Stream(self._next, on_message)
        self.streams[stream.number] = stream
        self._next += 2
        self.socket.sendall(request(stream.number, path, message, timeout=timeout, end=end))
        return stream

    def cancel(self, stream: Stream) -> None:
        if self.streams.pop(stream.number, None) is not None:
            self.socket.sendall(reset(stream.number))

    def read(self, stream: Stream, num_bytes: int) -> None:
        """Let so many more bytes of it come."""
        self.socket.sendall(frame(WINDOW_UPDATE, 0, stream.number, struct.pack(">I", num_bytes)))

    def receive(self) -> None:
        """Take what has come."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + size:
                break
            self._frame(data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data, at + 9, size)
            at += 9 + size
        self._rest = data[at:]

    def close(self, *, abruptly: bool = False) -> None:
        if abruptly:  # a reset in place of a farewell
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        self.closed = True

    def _frame(self, kind: int, flags: int, number: int, data: bytes, at: int, size: int) -> None:
        stream = self.streams.get(number)
        if kind == DATA:
            if stream is not None:
                stream.take(data[at : at + size])
        elif kind == HEADERS and stream is not None:
            stream.take_headers(data[at : at + size])
        elif kind == SETTINGS and not flags & ACK:
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, data[at : at + size]))
        if stream is not None and ((kind in (DATA, HEADERS) and flags & END_STREAM) or kind == RST_STREAM):
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        del self.streams[stream.number]
        stream.ended_s = time.monotonic()
        self.on_end(stream)

    def _gone(self) -> None:
        self.close()
        for stream in list(self.streams.values()):
            self._end(stream)


class Poller:
    """Takes what comes on many connections."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, connection: Connection) -> Connection:
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def drop(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)

    def poll(self, timeout_s: float = 0.1) -> None:
        for key, _ in self._selector.select(timeout_s):
            connection = key.data
            connection.receive()
            if connection.closed:
                self._selector.unregister(key.fileobj)

    def for_s(self, seconds: float) -> Iterator[None]:
        """Poll until so much time has passed, and come back after each round."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self.poll(min(left_s, 0.05))
            yield
