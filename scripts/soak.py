#!/usr/bin/env python3
"""A soak: clients that are killed, half-open, reset, late and stalled, over gRPC and HTTP, for minutes or hours.

Client processes (scripts/shell_load/rude.py) do everything wrong at random and are killed at random, `kill -9`. Once a
minute all are killed, the server comes to rest, and its memory, threads, descriptors, tasks and objects are written
down: growth is from the first rest to the last. Before that a polite request must be served. Before the first, many
texts at once have started what threads there may ever be: pools make theirs when first needed.

    scripts/soak.py                       ten minutes, as in docs/server.md
    scripts/soak.py --minutes 600 --png soak.png
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shell_load.report import table  # noqa: E402
from shell_load.server import Child  # noqa: E402

from serving.client import LoongClient, generate_request  # noqa: E402

RUDE = Path(__file__).with_name("shell_load") / "rude.py"
MAX_RSS_MB, MAX_OTHER = 20, {"threads": 0, "fds": 0, "tasks": 0, "open": 0}
COLUMNS = ("rss_mb", "threads", "os_threads", "fds", "tasks", "open", "objects")


class Crowd:
    """Rude clients: so many at a time, each killed after a second or a few."""

    def __init__(self, child: Child, size: int) -> None:
        message = generate_request([1, 2, 3], max_tokens=300, ignore_eos=True).SerializeToString()
        self._words = [str(child.port), str(child.http_port), message.hex()]
        self._size = size
        self._rng, self._seeds = random.Random(0), itertools.count()
        self._clients: list[tuple[subprocess.Popen[bytes], float]] = []
        self.num_killed = 0

    def run(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < end_s:
            for client, until_s in list(self._clients):
                if now_s > until_s:
                    self._clients.remove((client, until_s))
                    self._kill(client)
            while len(self._clients) < self._size:
                words = [sys.executable, str(RUDE), str(next(self._seeds)), *self._words]
                self._clients.append((subprocess.Popen(words), now_s + self._rng.uniform(0.5, 5)))
            time.sleep(0.1)

    def go(self) -> None:
        while self._clients:
            self._kill(self._clients.pop()[0])

    def _kill(self, client: subprocess.Popen[bytes]) -> None:
        if client.poll() is not None:
            raise RuntimeError(f"a client ended by itself, with status {client.returncode}")
        client.kill()
        client.wait()
        self.num_killed += 1


async def polite(child: Child) -> None:
    """One request, served as if nothing were the matter. Raises what the client raises."""
    async with LoongClient(f"127.0.0.1:{child.port}") as client:
        answer = await client.generate(generate_request([1, 2, 3], max_tokens=20), timeout_s=120)
    assert len(answer.token_ids) == 20


async def warm(child: Child, num_texts: int = 16) -> None:
    """Texts at once, for all threads of the pool that encodes them."""
    async with LoongClient(f"127.0.0.1:{child.port}") as client:
        request = generate_request("The sky is blue. " * 2000, max_tokens=2)
        await asyncio.gather(*(client.generate(request, timeout_s=120) for _ in range(num_texts)))


def rest(child: Child) -> dict[str, Any]:
    """What the server holds when nothing is asked of it."""
    deadline_s = time.monotonic() + 60
    stats = child.ask()
    while time.monotonic() < deadline_s:
        time.sleep(1)
        before, stats = stats, child.ask()
        if stats["open"] == 0 and all(before[name] == stats[name] for name in ("fds", "tasks")):
            break
    return stats


def picture(path: Path, minutes: list[float], rests: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6))
    for axis, names in zip(axes, (("rss_mb",), ("objects",), ("threads", "fds", "tasks")), strict=True):
        for name in names:
            axis.plot(minutes, [it[name] for it in rests], marker="o", markersize=3, label=name)
        axis.legend(loc="center right")
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6, help="at a time")
    parser.add_argument("--period-s", type=float, default=50.0, help="from one rest to the next")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--png", type=Path, help="file for a picture")
    options = parser.parse_args()
    rests, minutes = [], []
    start_s = time.monotonic()
    with Child(step_ms=20, http=1, write_timeout_s=2, max_running=256, max_waiting=64) as child:
        asyncio.run(warm(child))
        crowd = Crowd(child, options.clients)
        while True:
            crowd.run(min(options.period_s, max(1.0, 60 * options.minutes - (time.monotonic() - start_s))))
            asyncio.run(polite(child))
            crowd.go()
            rests.append(rest(child))
            minutes.append((time.monotonic() - start_s) / 60)
            print(
                f"{minutes[-1]:6.1f} min:", ", ".join(f"{name} {rests[-1][name]:,.0f}" for name in COLUMNS), flush=True
            )
            if minutes[-1] >= options.minutes:
                break
    first, last = rests[0], rests[-1]
    rows = [
        [name, f"{first[name]:,.1f}", f"{last[name]:,.1f}", f"{last[name] - first[name]:+,.1f}"] for name in COLUMNS
    ]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; {crowd.num_killed} clients killed in {minutes[-1]:.1f} minutes")
    print(table(("", "first rest", "last rest", "growth"), rows))
    if options.json:
        options.json.write_text(json.dumps({"minutes": minutes, "rests": rests}, indent=1))
    if options.png:
        picture(options.png, minutes, rests)
    more = sorted((Counter(last["thread_names"]) - Counter(first["thread_names"])).elements())
    print("threads at the last rest and not at the first:", ", ".join(more) or "none")
    grown = [name for name, most in MAX_OTHER.items() if last[name] - first[name] > most]
    grown += ["rss_mb"] if last["rss_mb"] - first["rss_mb"] > MAX_RSS_MB else []
    print("grown beyond bounds:", ", ".join(grown) or "nothing")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
