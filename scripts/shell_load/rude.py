"""A client process that does everything wrong at random, until it is killed: see `_DEEDS`.

    python rude.py SEED GRPC_PORT HTTP_PORT MESSAGE_HEX

Frames and sockets only, so that it starts in a moment. What it is not: a fuzzer of messages, or a load at a rate.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shell_load.http2 import Connection, Poller, reset, settings  # noqa: E402

GENERATE = "/loong.v1.Loong/Generate"
_BODY = b'{"prompt": "The sky is blue.", "max_tokens": 200, "stream": %s}'


class Rude:
    def __init__(self, seed: int, grpc_port: int, http_port: int, message: bytes) -> None:
        self._rng = random.Random(seed)
        self._grpc_port, self._http_port, self._message = grpc_port, http_port, message

    def run(self) -> None:
        while True:
            deed = self._rng.choice(_DEEDS)
            try:
                deed(self)
            except OSError:  # the server may shut a door that we slam
                time.sleep(0.01)

    def read_some(self) -> None:
        """Streams, of which some are cancelled in the midst; the rest end with the connection."""
        connection, poller = Connection(self._grpc_port), Poller()
        poller.add(connection)
        streams = [connection.call(GENERATE, self._message) for _ in range(self._rng.randint(1, 12))]
        self._for_a_moment(poller)
        for stream in streams[::2]:
            connection.cancel(stream)
        self._for_a_moment(poller)
        connection.close(abruptly=self._rng.random() < 0.5)

    def reset_at_once(self) -> None:
        """Calls and their resets, in one packet or nearly."""
        connection, poller = Connection(self._grpc_port), Poller()
        poller.add(connection)
        for _ in range(self._rng.randint(1, 30)):
            connection.cancel(connection.call(GENERATE, self._message))
        connection.socket.sendall(reset(99_999))
        self._for_a_moment(poller)
        connection.close()

    def deadline_storm(self) -> None:
        connection, poller = Connection(self._grpc_port), Poller()
        poller.add(connection)
        for _ in range(self._rng.randint(10, 40)):
            connection.call(GENERATE, self._message, timeout=f"{self._rng.randint(1, 60)}m")
        for _ in poller.for_s(0.2):
            pass
        connection.close(abruptly=self._rng.random() < 0.5)

    def half_open(self) -> None:
        """A call whose end never comes, half a frame, half a greeting; then nothing, then no more."""
        connection = Connection(self._grpc_port)
        connection.call(GENERATE, self._message, end=False)
        connection.socket.sendall(b"\0\1\0\0")
        greeting = settings(65_535)
        other = socket.create_connection(("127.0.0.1", self._grpc_port))
        other.sendall(greeting[: self._rng.randrange(len(greeting))])
        time.sleep(self._rng.uniform(0, 0.5))
        connection.close(abruptly=self._rng.random() < 0.5)
        other.close()

    def stall(self) -> None:
        """Take nothing, for longer or shorter than the server bears it."""
        connection = Connection(self._grpc_port, window_bytes=self._rng.choice((0, 100)), receive_buffer=4096)
        for _ in range(4):
            connection.call(GENERATE, self._message)
        time.sleep(self._rng.uniform(0, 4))
        connection.close(abruptly=self._rng.random() < 0.5)

    def http_some(self) -> None:
        """A body, whole or in part; its answer, whole or in part."""
        body = _BODY % self._rng.choice((b"true", b"false"))
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        data = head % len(body) + body
        with socket.create_connection(("127.0.0.1", self._http_port)) as connection:
            if self._rng.random() < 0.3:
                connection.sendall(data[: self._rng.randrange(len(data))])
                time.sleep(self._rng.uniform(0, 0.3))
                return
            connection.sendall(data)
            connection.settimeout(0.5)
            try:
                for _ in range(self._rng.randint(0, 20)):
                    if not connection.recv(4096):
                        return
            except TimeoutError:
                return

    def _for_a_moment(self, poller: Poller) -> None:
        for _ in poller.for_s(self._rng.uniform(0, 0.3)):
            pass


_DEEDS: tuple[Callable[[Rude], None], ...] = (
    Rude.read_some,
    Rude.reset_at_once,
    Rude.deadline_storm,
    Rude.half_open,
    Rude.stall,
    Rude.http_some,
)


if __name__ == "__main__":
    seed, grpc_port, http_port, message = sys.argv[1:]
    Rude(int(seed), int(grpc_port), int(http_port), bytes.fromhex(message)).run()
