"""The event log: everything that swayed a decision, in order, so that every incident becomes a unit test (DESIGN 3).

A file is a sequence of frames, each a little-endian u32 length and that many bytes of msgpack. The first frame is a
`LogHeader`; each other one a `LogFrame`: an event, its time, and the digest of the commands it led to. A file that
ends within a frame (the process died) is read up to the last whole frame.
What it is not: the replay (`scripts/replay.py`) or a metrics store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from loong_jax import codec
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.types import AnyCommand, AnyEvent, Record

_LENGTH_BYTES = 4


class LogHeader(Record, frozen=True):
    """What is needed to build the same manager again. `policy` is a name in `loong_jax.policy.POLICIES`."""

    version: str
    cluster: ClusterConfig
    limits: LimitsConfig
    policy: str
    coefficients: dict[str, float]


class LogFrame(Record, frozen=True):
    now_us: int
    event: AnyEvent
    commands_digest: bytes


class EventLogError(ValueError):
    """The file is no event log."""


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_header_decoder = msgspec.msgpack.Decoder(LogHeader)
_frame_decoder = msgspec.msgpack.Decoder(LogFrame)


class EventLogWriter:
    """Writes a new log; buffered, so call `flush` when the engine is idle and `close` at the end."""

    def __init__(self, path: Path | str, header: LogHeader) -> None:
        self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (lives as long as the engine)
        self._frame(_encoder.encode(header))

    def write(self, now_us: int, event: AnyEvent, commands: Iterable[AnyCommand]) -> None:
        self._frame(_encoder.encode(LogFrame(now_us, event, codec.digest(commands))))

    def _frame(self, payload: bytes) -> None:
        self._file.write(len(payload).to_bytes(_LENGTH_BYTES, "little"))
        self._file.write(payload)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_event_log(path: Path | str) -> tuple[LogHeader, Iterator[LogFrame]]:
    """The header, and the frames as they are read. Raises `EventLogError` on a file that is no event log."""
    file = open(path, "rb")  # noqa: SIM115 (closed by the iterator)
    payload = _next_payload(file)
    try:
        header = _header_decoder.decode(payload or b"")
    except msgspec.MsgspecError as error:
        file.close()
        raise EventLogError(f"{path}: no event log: {error}") from error
    return header, _frames(file, path)


def _frames(file: BinaryIO, path: Path | str) -> Iterator[LogFrame]:
    with file:
        while (payload := _next_payload(file)) is not None:
            try:
                yield _frame_decoder.decode(payload)
            except msgspec.MsgspecError as error:
                raise EventLogError(f"{path}: corrupt frame before byte {file.tell()}: {error}") from error


def _next_payload(file: BinaryIO) -> bytes | None:
    length = file.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    num_bytes = int.from_bytes(length, "little")
    payload = file.read(num_bytes)
    return payload if len(payload) == num_bytes else None
