#!/usr/bin/env python3
"""Ten times what an engine can serve: what still gets served, and how fast the others are refused.

The paced engine (scripts/shell_load/engine.py) serves so many requests a second and no more; a client of bare frames
asks for that, and then for ten times as much, without waiting for answers. Goodput counts requests that had their first
token in `--ttft-s` and all of their tokens.

    scripts/bench_overload.py            two minutes, as in docs/server.md
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shell_load.http2 import Connection, Poller, Stream  # noqa: E402
from shell_load.report import percentile, table  # noqa: E402
from shell_load.server import GENERATE, Child  # noqa: E402

from serving.client import generate_request  # noqa: E402

MAX_TOKENS, STEP_MS, MAX_RUNNING, MAX_WAITING = 20, 50, 64, 64
CAPACITY = MAX_RUNNING / (MAX_TOKENS * STEP_MS / 1000)
NUM_CONNECTIONS = 16
_QUIET_S = 5.0  # after the last request


class Phase(NamedTuple):
    name: str
    rate: float
    seconds: float


def offer(child: Child, phase: Phase) -> list[Stream]:
    """All requests of a phase, ended."""
    poller, message = Poller(), generate_request([1, 2, 3], max_tokens=MAX_TOKENS).SerializeToString()
    connections = [poller.add(Connection(child.port)) for _ in range(NUM_CONNECTIONS)]
    asked: list[Stream] = []
    start_s = time.monotonic()
    for _ in range(int(phase.rate * phase.seconds)):
        due_s = start_s + len(asked) / phase.rate
        while (left_s := due_s - time.monotonic()) > 0:
            poller.poll(left_s)
        asked.append(connections[len(asked) % NUM_CONNECTIONS].call(GENERATE, message))
        poller.poll(0)
    for _ in poller.for_s(_QUIET_S):
        pass
    for connection in connections:
        connection.close()
    return asked


def row(phase: Phase, asked: list[Stream], ttft_s: float) -> tuple[list[object], float]:
    ends = Counter(stream.status for stream in asked)
    good = [s for s in asked if s.status == "0" and s.first_s - s.sent_s <= ttft_s]
    refused_ms = [1000 * (s.ended_s - s.sent_s) for s in asked if s.status == "8"]
    hinted = sum(1 for s in asked if s.status == "8" and s.hint_ms)
    # Until the last one ended: what was still queued when the phase was over counts, and so does its time.
    goodput = len(good) / (max(s.ended_s for s in good) - asked[0].sent_s)
    times = [f"{percentile(refused_ms, q):.1f}" if refused_ms else "" for q in (50, 99, 100)]
    others = {status: count for status, count in ends.items() if status not in ("0", "8")}
    figures = [
        phase.name,
        f"{phase.rate:g}",
        len(asked),
        f"{goodput:.1f}",
        len(refused_ms),
        hinted,
        *times,
        others or 0,
    ]
    return figures, goodput


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--peak-seconds", type=float, default=12.0, help="of each phase that looks for the peak")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--ttft-s", type=float, default=3.0)
    options = parser.parse_args()
    gc.disable()  # all calls are kept to be counted, and looking through them would hold up the clock that times them
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; the engine serves {CAPACITY:g} requests/s")
    phases = [
        Phase("capacity", CAPACITY, options.peak_seconds),
        Phase("a little more", 1.2 * CAPACITY, options.peak_seconds),
        Phase("overload", options.times * CAPACITY, options.seconds),
    ]
    rows, goodputs = [], []
    with Child(step_ms=STEP_MS, max_running=MAX_RUNNING, max_waiting=MAX_WAITING) as child:
        for phase in phases:
            figures, goodput = row(phase, offer(child, phase), options.ttft_s)
            rows.append(figures)
            goodputs.append(goodput)
    columns = (
        "",
        "offered/s",
        "requests",
        "goodput/s",
        "refused",
        "with a hint",
        "p50 ms",
        "p99",
        "most",
        "other ends",
    )
    print(table(columns, rows))
    print(f"goodput of the overload: {goodputs[-1] / max(goodputs):.0%} of the peak")


if __name__ == "__main__":
    main()
