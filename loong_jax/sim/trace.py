"""Who ran where and when: spans of steps, and their export for chrome://tracing and Perfetto.

What it is not: a picture (`picture.py`) or the event log (`loong_jax/eventlog.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from loong_jax.types import Phase

MAX_NAMED_REQUESTS = 16
"""Requests of a step that an exported span names: a viewer shows no more."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """One step: `rows` are (request, tokens computed or moved)."""

    start_us: int
    end_us: int
    instances: tuple[int, ...]
    phase: Phase
    rows: tuple[tuple[int, int], ...]

    @property
    def dop(self) -> int:
        return len(self.instances)


def chrome_trace(spans: Iterable[Span], num_instances: int) -> bytes:
    """JSON of the Trace Event Format: a thread for each instance, a complete event for each step on each of them."""
    events: list[dict] = [
        {"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": f"instance {i}"}}
        for i in range(num_instances)
    ]
    for span in spans:
        tokens = sum(count for _, count in span.rows)
        args = {
            "dop": span.dop,
            "rows": len(span.rows),
            "tokens": tokens,
            "requests": [request for request, _ in span.rows[:MAX_NAMED_REQUESTS]],
        }
        name = f"{span.phase} x{span.dop}, {len(span.rows)} rows, {tokens} tokens"
        events += [
            {
                "ph": "X", "pid": 0, "tid": instance, "cat": str(span.phase), "name": name,
                "ts": span.start_us, "dur": span.end_us - span.start_us, "args": args,
            }
            for instance in span.instances
        ]  # fmt: skip
    return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events})
