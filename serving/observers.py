"""Who is told what becomes of requests: metrics, log, traces. Any number of them, none to begin with.

What it is not: one of them (`serving/http/request_metrics.py`, `serving/request_log.py`, `serving/tracing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loong_jax.types import FinishReason
from serving.errors import Refusal
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.stream import StreamObserver


class Observer(Protocol):
    """Is told of requests, in the asyncio thread; `serving/context.py` knows their names."""

    def stream(self, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int) -> StreamObserver:
        """A choice of the request is about to be handed in; it arrived at `arrived_us` of the engine's clock."""
        ...

    def refused(self, refusal: Refusal) -> None: ...


class Observers:
    """All of them as one."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def add(self, observer: Observer) -> None:
        self._all.append(observer)

    def stream(self, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int) -> StreamObserver | None:
        streams = [observer.stream(request, arrived_us, num_prompt_tokens) for observer in self._all]
        return streams[0] if len(streams) == 1 else _Streams(streams) if streams else None

    def refused(self, refusal: Refusal) -> None:
        for observer in self._all:
            observer.refused(refusal)


class _Streams:
    def __init__(self, streams: Sequence[StreamObserver]) -> None:
        self._streams = streams

    def prefilled(self, now_us: int) -> None:
        for stream in self._streams:
            stream.prefilled(now_us)

    def emitted(self, num_tokens: int, now_us: int) -> None:
        for stream in self._streams:
            stream.emitted(num_tokens, now_us)

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        for stream in self._streams:
            stream.ended(reason, num_tokens)
