"""What belongs to the call under way, wherever its work goes: whose it is, the request's name, and the caller's trace.

What it is not: a place for arguments. Only what observers need and no step of the work does, and the caller, whom a
listener knows and who owns the names of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar

caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the caller's key; empty where there are no keys."""
request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers", default={})  # noqa: B039 (never changed)

_TRACE_HEADERS = ("traceparent", "tracestate")
_MAX_HEADER_CHARS = 512


def take_trace_headers(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Remember the caller's trace, of gRPC metadata or HTTP headers, for the task under way."""
    found = {name.lower(): value for name, value in headers if name.lower() in _TRACE_HEADERS}
    kept = {name: value for name, value in found.items() if isinstance(value, str) and len(value) <= _MAX_HEADER_CHARS}
    if kept:
        trace_headers.set(kept)
