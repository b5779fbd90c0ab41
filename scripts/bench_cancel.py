#!/usr/bin/env python3
"""From a client's cancel to freed pages: latency by the state that the request was in, and what is left afterwards.

Client, server, loop, manager and policy are the real ones in one process; the mock executor takes `--step-ms` for a
step and proves that no page is given away while a step uses it. Afterwards no page, sink, stream or task may be left;
objects, threads and descriptors are compared with what a first round left.

    scripts/bench_cancel.py              10,000 cancels, as in docs/server.md
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
from shell_load.cancels import STATES, Cancels  # noqa: E402
from shell_load.report import percentile, table  # noqa: E402


def figures(times_s: list[float]) -> list[str]:
    return [f"{1000 * percentile(times_s, q):.2f}" for q in (50, 90, 99, 100)]


def held() -> dict[str, float]:
    gc.collect()
    process = psutil.Process()
    return {
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "descriptors": process.num_fds(),
        "MB": round(process.memory_info().rss / 2**20, 1),
    }


async def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Times by state, and what was held after a first round and at the end."""
    async with Cancels(options.step_ms / 1000) as cancels:
        await cancels.run(20, options.clients)
        cancels.forget()
        before = held()
        await cancels.run(-(-options.cancels // len(STATES)), options.clients)
        times = cancels.latencies_s
        cancels.forget()
        return times, before, held()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cancels", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24, help="side by side")
    parser.add_argument("--step-ms", type=float, default=5.0)
    options = parser.parse_args()
    times, before, after = asyncio.run(measure(options))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; a step takes {options.step_ms:g} ms, {options.clients} clients")
    rows = [[state, len(times[state]), *figures(times[state])] for state in STATES if state != "finished"]
    timed = [time_s for state in STATES if state != "finished" for time_s in times[state]]
    rows.append(["all of these", len(timed), *figures(timed)])
    rows.append(["finished", len(times["finished"]), *["free before"] * 4])
    print(table(("cancelled while", "cancels", "p50 ms", "p90", "p99", "most"), rows))
    print("before and after:", ", ".join(f"{name} {before[name]:,} {after[name]:,}" for name in before))


if __name__ == "__main__":
    main()
