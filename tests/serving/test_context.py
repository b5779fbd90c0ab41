"""Trace headers of gRPC and HTTP, within bounds."""

from contextvars import copy_context

import pytest

from serving import context

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ([("Traceparent", PARENT), ("x", "y")], {"traceparent": PARENT}),
        ([("traceparent", PARENT), ("tracestate", "a=b")], {"traceparent": PARENT, "tracestate": "a=b"}),
        ([("traceparent", b"bytes")], {}),
        ([("traceparent", "x" * 513)], {}),
        ([], {}),
    ],
)
def test_headers_are_kept(headers, kept):
    def take():
        context.take_trace_headers(headers)
        return context.trace_headers.get()

    assert copy_context().run(take) == kept
