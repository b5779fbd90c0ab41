#!/usr/bin/env python3
"""A thousand readers that take nothing, each on its own connection: what they cost in memory, and what others feel.

Streams of attentive readers run throughout; their inter-token times are compared before and while the others stall. The
stalled clients let no byte of an answer come, and their requests run in the engine until they are cut off.

    scripts/bench_stalled.py             as in docs/server.md
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shell_load.http2 import Connection, Poller, Stream  # noqa: E402
from shell_load.report import percentile, table  # noqa: E402
from shell_load.server import GENERATE, Child  # noqa: E402

from serving.client import generate_request  # noqa: E402

ENDLESS = generate_request([1, 2, 3], max_tokens=1_000_000, ignore_eos=True).SerializeToString()
NUM_CONNECTIONS = 8


class Attentive:
    """Streams that are read at once, and the times between their tokens."""

    def __init__(self, child: Child, poller: Poller, num_streams: int) -> None:
        self._connections = [poller.add(Connection(child.port)) for _ in range(NUM_CONNECTIONS)]
        self._poller = poller
        self._gaps_ms: list[float] = []
        self.streams = [self._open(index) for index in range(num_streams)]

    def _open(self, index: int) -> Stream:
        last_s = 0.0

        def came(message: bytes) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if last_s:
                self._gaps_ms.append(1000 * (now_s - last_s))
            last_s = now_s

        return self._connections[index % NUM_CONNECTIONS].call(GENERATE, ENDLESS, came)

    def gaps_ms(self, seconds: float) -> list[float]:
        """Those of the next so many seconds."""
        self._gaps_ms = []
        for _ in self._poller.for_s(seconds):
            pass
        return self._gaps_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stalled", type=int, default=1000)
    parser.add_argument("--attentive", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--cut-off-s", type=float, default=30.0, help="the server's write timeout")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; a token every {options.step_ms:g} ms for each of {options.attentive}")
    with Child(step_ms=options.step_ms, write_timeout_s=options.cut_off_s) as child:
        poller = Poller()
        attentive = Attentive(child, poller, options.attentive)
        attentive.gaps_ms(3)
        rows = []

        def measure(name: str, seconds: float) -> None:
            gaps = attentive.gaps_ms(seconds)
            stats = child.ask()
            figures = [f"{percentile(gaps, q):.1f}" for q in (50, 99, 100)]
            rows.append([name, *figures, f"{stats['rss_mb']:.1f}", stats["fds"], stats["open"]])

        measure("before", options.seconds)
        start_s = time.monotonic()
        connections = []
        for _ in range(options.stalled):
            connections.append(poller.add(Connection(child.port, window_bytes=0, receive_buffer=4096)))
            connections[-1].call(GENERATE, ENDLESS)
            poller.poll(0)
        streams = [stream for connection in connections for stream in connection.streams.values()]
        attentive.gaps_ms(2)
        measure("while they stall", options.seconds)
        measure("while they are cut off", max(5.0, start_s + options.cut_off_s + 8 - time.monotonic()))
        for connection in connections:
            for stream in connection.streams.values():
                connection.read(stream, 1 << 20)
        attentive.gaps_ms(3)
        ends = Counter((stream.status, stream.num_messages > 0) for stream in streams)
        for connection in connections:
            poller.drop(connection)
            connection.close()
        attentive.gaps_ms(2)
        measure("after they left", 5)
    print(table(("attentive readers", "p50 ms", "p99", "most", "server MB", "descriptors", "requests"), rows))
    print("when they read at last: ", ", ".join(f"{count} got status {status}" for (status, _), count in ends.items()))


if __name__ == "__main__":
    main()
