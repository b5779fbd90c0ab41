"""Events and commands as bytes: the log, the replay and the workers of other hosts read the same (DESIGN 3).

What it is: msgpack by field order, each record tagged with its name. Equal values give equal bytes (INV-7).
What it is not: a stable format across versions; a log names the version that wrote it (`eventlog.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from loong_jax.types import AnyCommand, AnyEvent

_encoder = msgspec.msgpack.Encoder(order="deterministic")
_event_decoder = msgspec.msgpack.Decoder(AnyEvent)
_command_decoder = msgspec.msgpack.Decoder(AnyCommand)

DIGEST_BYTES = 8


def encode_event(event: AnyEvent) -> bytes:
    return _encoder.encode(event)


def decode_event(data: bytes) -> AnyEvent:
    """Raises `msgspec.DecodeError` when `data` is no event."""
    return _event_decoder.decode(data)


def encode_command(command: AnyCommand) -> bytes:
    return _encoder.encode(command)


def decode_command(data: bytes) -> AnyCommand:
    """Raises `msgspec.DecodeError` when `data` is no command."""
    return _command_decoder.decode(data)


def digest(commands: Iterable[AnyCommand]) -> bytes:
    """Hash of the bytes of commands, in order: what the event log keeps to verify a replay."""
    return hashlib.blake2b(_encoder.encode(list(commands)), digest_size=DIGEST_BYTES).digest()
