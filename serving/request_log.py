"""A line for each request that ended, with its times, and for each call that was refused.

An observer of requests. What it is not: the engine's decisions about them (`serving/decision_log.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from loong_jax.types import FinishReason
from serving import context
from serving.errors import Refusal
from serving.logs import Bounded
from serving.proto.loong.v1 import loong_pb2 as pb

_logger = logging.getLogger(__name__)


class RequestLog:
    """`now_us`: the engine's clock."""

    def __init__(self, now_us: Callable[[], int], lines: Bounded | None = None) -> None:
        self._now_us = now_us
        self._lines = lines or Bounded(_logger, burst=100)

    def stream(self, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int) -> _Stream:
        return _Stream(self._lines, self._now_us, context.request_id.get(), arrived_us, num_prompt_tokens)

    def refused(self, refusal: Refusal) -> None:
        name = context.request_id.get() or None
        self._lines.tell(logging.WARNING, "refused", request_id=name, code=refusal.code.name, message=str(refusal))


class _Stream:
    def __init__(
        self, lines: Bounded, now_us: Callable[[], int], request_id: str, arrived_us: int, num_prompt_tokens: int
    ) -> None:
        self._lines, self._now_us, self._request_id = lines, now_us, request_id
        self._arrived_us, self._num_prompt_tokens = arrived_us, num_prompt_tokens
        self._started_us: int | None = None
        self._first_us: int | None = None

    def prefilled(self, now_us: int) -> None:
        self._started_us = self._started_us or now_us

    def emitted(self, num_tokens: int, now_us: int) -> None:
        self._first_us = self._first_us or now_us

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        self._lines.tell(
            logging.INFO,
            "ended",
            request_id=self._request_id,
            reason=reason.name.lower(),
            prompt_tokens=self._num_prompt_tokens,
            tokens=num_tokens,
            queue_s=self._since(self._started_us),
            ttft_s=self._since(self._first_us),
            total_s=self._since(self._now_us()),
        )

    def _since(self, time_us: int | None) -> float | None:
        return None if time_us is None else round((time_us - self._arrived_us) / 1e6, 4)
