#!/usr/bin/env python3
"""What the shell around the engine costs: the message rate beside the library's own, tokens a second, time to the first
token, streams at once.

A server in a process of its own, over an engine that costs next to nothing (scripts/shell_load/engine.py), and a client
of bare frames, which costs a fraction of what it measures. The library's rate is that of a grpc.aio handler that writes
one message again and again to the same client in the same run.

    scripts/bench_server.py              everything in docs/server.md
    scripts/bench_server.py --only rate  one of rate, tokens, ttft, streams
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shell_load.http2 import Connection, Poller, Stream  # noqa: E402
from shell_load.report import percentile, table  # noqa: E402
from shell_load.server import GENERATE, RAW, RAW_ONCE, RAW_PACED, Child  # noqa: E402

from serving.client import generate_request  # noqa: E402
from serving.proto.loong.v1 import loong_pb2 as pb  # noqa: E402

NUM_STREAMS, NUM_CONNECTIONS = 256, 8
ENDLESS = generate_request([1, 2, 3], max_tokens=1_000_000, ignore_eos=True).SerializeToString()


class Rate(NamedTuple):
    messages_per_s: float
    tokens_per_s: float
    cpu_us: float  # of the server, a message


class Load:
    """Endless streams over a few connections."""

    def __init__(self, child: Child, path: str, num_streams: int = NUM_STREAMS) -> None:
        self.poller, self._child = Poller(), child
        self.num_tokens = 0
        self.connections = [self.poller.add(Connection(child.port)) for _ in range(NUM_CONNECTIONS)]
        take = self._take if path == GENERATE else None
        message = ENDLESS if path == GENERATE else b""
        self.streams = [
            self.connections[index % NUM_CONNECTIONS].call(path, message, take) for index in range(num_streams)
        ]

    def _take(self, message: bytes) -> None:
        self.num_tokens += len(pb.GenerateResponse.FromString(message).tokens.token_ids)

    def measure(self, seconds: float) -> Rate:
        before, tokens, messages = self._child.ask(), self.num_tokens, self.num_messages()
        start_s = time.monotonic()
        for _ in self.poller.for_s(seconds):
            pass
        elapsed_s, num_messages = time.monotonic() - start_s, self.num_messages() - messages
        cpu_s = self._child.ask()["cpu_s"] - before["cpu_s"]
        tokens = self.num_tokens - tokens
        return Rate(num_messages / elapsed_s, tokens / elapsed_s, cpu_s / max(1, num_messages) * 1e6)

    def warm(self, seconds: float = 1.0) -> Load:
        for _ in self.poller.for_s(seconds):
            pass
        return self

    def num_messages(self) -> int:
        return sum(stream.num_messages for stream in self.streams)


def rate_of(seconds: float, path: str = GENERATE, **flags: object) -> Rate:
    with Child(**flags) as child:
        return Load(child, path).warm().measure(seconds)


def bench_rate(seconds: float) -> float:
    """Messages a second at several paces of the engine; returns the highest rate with text."""
    raws = [rate_of(seconds, RAW, kind="raw")]
    best: dict[int, Rate] = {}
    rows: list[list[object]] = []
    for text in (1, 0):
        for share in (0.5, 0.6, 0.7, 0.8, 0.9):
            rate = rate_of(seconds, text=text, step_ms=1000 * NUM_STREAMS / (share * raws[0].messages_per_s))
            single = rate.tokens_per_s / max(1.0, rate.messages_per_s)
            rows.append(["text" if text else "ids", f"{share:.0%}", *_figures(rate, raws[0]), f"{single:.2f}"])
            if text not in best or rate.messages_per_s > best[text].messages_per_s:
                best[text] = rate
    raws.append(rate_of(seconds, RAW, kind="raw"))
    for what in raws:
        rows.append(["library alone", "", *_figures(what, raws[0]), ""])
    library = sum(rate.messages_per_s for rate in raws) / len(raws)
    print(table(("messages", "offered", "messages/s", "of the library's", "server CPU us", "tokens a message"), rows))
    for text, rate in best.items():
        what = "text" if text else "ids"
        print(f"{what}: {rate.messages_per_s:,.0f}/s, {rate.messages_per_s / library:.0%} of the library's mean rate")
    return best[1].messages_per_s


def _figures(rate: Rate, raw: Rate) -> list[str]:
    share = f"{rate.messages_per_s / raw.messages_per_s:.0%}"
    return [f"{rate.messages_per_s:,.0f}", share, f"{rate.cpu_us:.1f}"]


def bench_tokens(seconds: float) -> None:
    rows: list[list[object]] = []
    for text in (1, 0):
        rate = rate_of(seconds, text=text, step_ms=0)
        per_message = rate.tokens_per_s / max(1.0, rate.messages_per_s)
        rows.append(["text" if text else "ids", f"{rate.tokens_per_s:,.0f}", f"{rate.messages_per_s:,.0f}",
                     f"{per_message:.1f}"])  # fmt: skip
    print(table(("messages", "tokens/s", "messages/s", "tokens a message"), rows))


def bench_ttft(seconds: float, messages_per_s: float) -> None:
    """New requests beside streams that use half the rate. The engine answers at once: all of it is the shell's. The
    library alone has the same load: as many streams that write together, once a step."""
    short = generate_request([1, 2, 3], max_tokens=1).SerializeToString()
    rows: list[list[object]] = []
    for what, kind, path, once, message in (
        ("ids", "loong", GENERATE, GENERATE, short),
        ("text", "loong", GENERATE, GENERATE, short),
        ("library alone", "raw", RAW_PACED, RAW_ONCE, b""),
    ):
        step_ms = 1000 * NUM_STREAMS / (messages_per_s / 2)
        with Child(kind=kind, text=int(what == "text"), step_ms=step_ms) as child:
            load = Load(child, path).warm()
            asked, rate = first_messages(load, seconds, once, message)
        times_ms = [1000 * (stream.first_s - stream.sent_s) for stream in asked if stream.first_s]
        assert len(times_ms) == len(asked), f"{len(asked) - len(times_ms)} requests had no answer"
        figures = [f"{percentile(times_ms, q):.2f}" for q in (50, 90, 99, 100)]
        rows.append([what, len(asked), f"{rate:,.0f}", *figures])
    print(table(("first messages", "requests", "at messages/s", "p50 ms", "p90", "p99", "most"), rows))


def first_messages(load: Load, seconds: float, path: str, message: bytes) -> tuple[list[Stream], float]:
    """A new stream each 10 ms, and the messages a second beside them."""
    asked: list[Stream] = []
    num_messages = load.num_messages()
    start_s = next_s = time.monotonic()
    for _ in load.poller.for_s(seconds):
        while time.monotonic() >= next_s:
            next_s += 0.01
            asked.append(load.connections[len(asked) % NUM_CONNECTIONS].call(path, message))
        load.poller.poll(0.001)
    rate = (load.num_messages() - num_messages) / (time.monotonic() - start_s)
    load.warm(0.5)
    return asked, rate


def bench_streams(num_streams: int) -> None:
    """All at once, over a few connections: each gets its tokens, or a refusal of ours."""
    message = generate_request([1, 2, 3], max_tokens=20).SerializeToString()
    with Child(step_ms=500) as child:
        poller = Poller()
        connections = [poller.add(Connection(child.port)) for _ in range(NUM_CONNECTIONS)]
        streams = [connections[index % NUM_CONNECTIONS].call(GENERATE, message) for index in range(num_streams)]
        start_s, most = time.monotonic(), 0
        while any(stream.status is None for stream in streams) and time.monotonic() < start_s + 120:
            poller.poll(0.1)
            most = max(most, sum(1 for stream in streams if stream.num_messages and stream.status is None))
        ends = Counter(stream.status for stream in streams)
    names = {"0": "OK", "1": "CANCELLED", "8": "RESOURCE_EXHAUSTED", None: "none"}
    print(f"{num_streams} streams at once, {most} of them streaming at one time; statuses:",
          ", ".join(f"{count} {names.get(status, status)}" for status, count in ends.items()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", choices=("rate", "tokens", "ttft", "streams"))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--messages-per-s", type=float, default=10_000, help="twice the rate of the ttft leg alone")
    parser.add_argument("--streams", type=int, default=5000)
    options = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}, Python {sys.version.split()[0]}")
    messages_per_s = options.messages_per_s
    if options.only in (None, "rate"):
        messages_per_s = bench_rate(options.seconds)
    if options.only in (None, "tokens"):
        bench_tokens(options.seconds)
    if options.only in (None, "ttft"):
        bench_ttft(options.seconds, messages_per_s)
    if options.only in (None, "streams"):
        bench_streams(options.streams)


if __name__ == "__main__":
    main()
