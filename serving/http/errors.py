"""Refusals as HTTP clients of OpenAI expect them: a status, and {"error": {message, type, param, code}}.

What it is not: the gRPC statuses (`serving/errors.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from serving.errors import (
    DuplicateRequest,
    EngineFailed,
    Forbidden,
    InvalidField,
    NotPossible,
    NotServing,
    QueueFull,
    Refusal,
    ShortDeadline,
    SlowReader,
    TooLong,
    TooManyCalls,
    Unauthenticated,
    UnknownRequest,
)


class HttpRefusal(Refusal):
    """A refusal that only HTTP knows."""

    status = 400
    type_ = "invalid_request_error"
    param: str | None = None
    error_code: str | None = None


class UnknownModel(HttpRefusal):
    status = 404
    param = "model"
    error_code = "model_not_found"


class UnknownPath(HttpRefusal):
    status = 404
    error_code = "not_found"


class WrongMethod(HttpRefusal):
    status = 405
    error_code = "method_not_allowed"


class SlowBody(HttpRefusal):
    status = 408
    error_code = "request_timeout"


class LargeBody(HttpRefusal):
    status = 413
    error_code = "request_too_large"


class WrongContentType(HttpRefusal):
    status = 415
    error_code = "unsupported_media_type"


class ManyBodies(HttpRefusal):
    """So much is being received that this body has to wait."""

    status = 503
    type_ = "overloaded_error"
    error_code = "overloaded"
    retry_ms = 1000


class _Kind(NamedTuple):
    status: int
    type_: str
    code: str


_KINDS: dict[type[Refusal], _Kind] = {
    InvalidField: _Kind(400, "invalid_request_error", "invalid_value"),
    TooLong: _Kind(400, "invalid_request_error", "context_length_exceeded"),
    Unauthenticated: _Kind(401, "authentication_error", "invalid_api_key"),
    Forbidden: _Kind(403, "permission_error", "not_allowed"),
    NotPossible: _Kind(400, "invalid_request_error", "not_possible"),
    UnknownRequest: _Kind(404, "invalid_request_error", "not_found"),
    DuplicateRequest: _Kind(409, "invalid_request_error", "duplicate_request_id"),
    QueueFull: _Kind(429, "rate_limit_error", "queue_full"),
    TooManyCalls: _Kind(429, "rate_limit_error", "key_limit"),
    # Counted for gRPC, too, and never sent over HTTP, which has no deadlines, and where nobody reads.
    SlowReader: _Kind(408, "invalid_request_error", "slow_reader"),
    ShortDeadline: _Kind(408, "invalid_request_error", "short_deadline"),
    NotServing: _Kind(503, "service_unavailable_error", "not_serving"),
    EngineFailed: _Kind(500, "server_error", "engine_failed"),
}
_UNKNOWN = _Kind(500, "server_error", "internal_error")

# The field of the gRPC message -> the field of the body; those of `sampling` lose their prefix.
_NAMES = {"text": "prompt", "token_ids": "prompt"}
_LEGACY_NAMES = {"top_logprobs": "logprobs", "prompt_logprobs": "logprobs"}


def status(refusal: Refusal) -> int:
    return refusal.status if isinstance(refusal, HttpRefusal) else _KINDS.get(type(refusal), _UNKNOWN).status


def body(refusal: Refusal) -> dict[str, Any]:
    if isinstance(refusal, HttpRefusal):
        type_, code, param = refusal.type_, refusal.error_code, refusal.param
    else:
        _, type_, code = _KINDS.get(type(refusal), _UNKNOWN)
        param = refusal.field if isinstance(refusal, InvalidField) else None
    return {"error": {"message": str(refusal), "type": type_, "param": param, "code": code}}


def encoded(refusal: Refusal) -> bytes:
    return msgspec.json.encode(body(refusal))


def headers(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    """`Retry-After`, where trying again may help; `retry-after-ms` is what OpenAI's clients look at first. 401 says
    what would do."""
    if isinstance(refusal, Unauthenticated):
        return [(b"www-authenticate", b"Bearer")]
    if refusal.retry_ms is None:
        return []
    seconds = -(-refusal.retry_ms // 1000)
    return [(b"retry-after", str(seconds).encode()), (b"retry-after-ms", str(refusal.retry_ms).encode())]


def in_body_names(refusal: InvalidField, *, chat: bool) -> InvalidField:
    """The same with the names that the client used."""
    name = refusal.field.removeprefix("sampling.")
    name = _NAMES.get(name, name)
    if not chat:
        name = _LEGACY_NAMES.get(name, name)
    message = str(refusal).removeprefix(f"{refusal.field}: ").replace("sampling.", "")
    return type(refusal)(name, message)
