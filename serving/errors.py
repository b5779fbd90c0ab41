"""What a client is told when something is refused or fails: the only place where errors become gRPC status codes.

What it is not: a check. `validation.py`, `server.py` and `loop.py` raise these; `answering` turns them into a status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loong_jax.types import RejectReason

RETRY_PUSHBACK_MS = 1000
DOMAIN = "loong"
_DETAIL_CHARS = 1000  # metadata are bounded, and the message goes twice


class PortTaken(Exception):
    """The address cannot be listened on."""


class Refusal(Exception):
    """A call that ends with a status other than OK. `retry_ms`: when trying again may help, None when it cannot.
    `reason`: the same for programs, which the words are not."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = "UNKNOWN"
    retry_ms: int | None = None


class InvalidField(Refusal):
    """A request field that cannot be served; the status starts with its name."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_FIELD"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class TooLong(InvalidField):
    """A prompt that can never fit, or leaves no room for what was asked."""

    reason = "TOO_LONG"


class UnknownRequest(Refusal):
    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_REQUEST"


class DuplicateRequest(Refusal):
    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST"


class QueueFull(Refusal):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retry_ms = RETRY_PUSHBACK_MS


class TooManyCalls(Refusal):
    """Of one key."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "KEY_LIMIT"

    def __init__(self, message: str, retry_ms: int) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class Unauthenticated(Refusal):
    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "NO_KEY"


class Forbidden(Refusal):
    """The key is known, and may not do that."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "NOT_ALLOWED"


class ShortDeadline(Refusal):
    """The answer would come too late, so it is not begun."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "SHORT_DEADLINE"


class NotPossible(Refusal):
    """Not as the server is now, or as it was started."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_POSSIBLE"


class SlowReader(Refusal):
    """The client takes nothing of what it asked for."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_READER"


class NotServing(Refusal):
    """Warming up or draining."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_SERVING"
    retry_ms = RETRY_PUSHBACK_MS


class EngineFailed(Refusal):
    code = grpc.StatusCode.INTERNAL
    reason = "ENGINE_FAILED"


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
    """End the call with the refusal's status and details. Raises (that is how grpc.aio ends a call)."""
    trailing = rpc_status.to_status(rich_status(refusal)).trailing_metadata
    if refusal.retry_ms is not None:
        trailing = (*trailing, ("grpc-retry-pushback-ms", str(refusal.retry_ms)))
    await context.abort(refusal.code, str(refusal), trailing)


def rich_status(refusal: Refusal) -> status_pb2.Status:
    """As google.rpc has it: an ErrorInfo, with a BadRequest that names the field, or a RetryInfo."""
    words = str(refusal)[:_DETAIL_CHARS]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN)]
    if isinstance(refusal, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=refusal.field, description=words)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if refusal.retry_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(refusal.retry_ms)
        details.append(retry)
    status = status_pb2.Status(code=refusal.code.value[0], message=words)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def answering(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Decorator of a servicer method (a coroutine; streams write to the context): a Refusal becomes the status."""

    @wraps(method)
    async def wrapper(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except Refusal as refusal:
            await end_call(context, refusal)

    return wrapper
