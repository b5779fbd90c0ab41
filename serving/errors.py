"""What a client is told when something is refused or fails: the only place where errors become gRPC status codes.

What it is not: a check. `validation.py`, `server.py` and `loop.py` raise these; `answering` turns them into a status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import grpc

from loong_jax.types import RejectReason

RETRY_PUSHBACK_MS = 1000


class PortTaken(Exception):
    """The address cannot be listened on."""


class Refusal(Exception):
    """A call that ends with a status other than OK. `retry_ms`: when trying again may help, None when it cannot."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    retry_ms: int | None = None


class InvalidField(Refusal):
    """A request field that cannot be served; the status starts with its name."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class TooLong(InvalidField):
    """A prompt that can never fit, or leaves no room for what was asked."""


class UnknownRequest(Refusal):
    code = grpc.StatusCode.NOT_FOUND


class DuplicateRequest(Refusal):
    code = grpc.StatusCode.ALREADY_EXISTS


class QueueFull(Refusal):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_ms = RETRY_PUSHBACK_MS


class NotServing(Refusal):
    """Warming up or draining."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_ms = RETRY_PUSHBACK_MS


class EngineFailed(Refusal):
    code = grpc.StatusCode.INTERNAL


_BY_REASON: dict[RejectReason, type[Refusal]] = {
    RejectReason.QUEUE_FULL: QueueFull,
    RejectReason.DRAINING: NotServing,
}


def rejected(reason: RejectReason, message: str, prompt_field: str) -> Refusal:
    """The refusal that says what the manager's Reject says."""
    if reason is RejectReason.TOO_LARGE:
        return TooLong(prompt_field, message)
    return _BY_REASON[reason](message)


async def end_call(context: grpc.aio.ServicerContext, refusal: Refusal) -> None:
    """End the call with the refusal's status. Raises (that is how grpc.aio ends a call)."""
    trailing = () if refusal.retry_ms is None else (("grpc-retry-pushback-ms", str(refusal.retry_ms)),)
    await context.abort(refusal.code, str(refusal), trailing)


def answering(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Decorator of a servicer method (a coroutine; streams write to the context): a Refusal becomes the status."""

    @wraps(method)
    async def wrapper(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except Refusal as refusal:
            await end_call(context, refusal)

    return wrapper
