#!/usr/bin/env python3
"""CPU time of the engine's thread per decode step, by part: manager with its policy, staging, page tables, the call of
the program, and the loop around them.

The real `EngineLoop`, manager, policy and executor serve a small checkpoint on eight virtual devices; only the groups
are chosen, by telling the manager of programs of one DoP alone. Time is `time.thread_time` of that one thread. The
devices' threads, which on an accelerator's host would not be there, wash its caches.

    scripts/bench_engine_thread.py            the cases of docs/engine_thread.md
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NUM_INSTANCES = 8
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", str(4 * NUM_INSTANCES))
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={2 * NUM_INSTANCES}")

import jax  # noqa: E402

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig  # noqa: E402
from loong_jax.cost.unmeasured import unmeasured  # noqa: E402
from loong_jax.manager import Manager  # noqa: E402
from loong_jax.policy.elastic import Elastic  # noqa: E402
from loong_jax.types import Finish, Phase, Prepare, ProgramReady, RunDecode, Sampling  # noqa: E402
from serving.loop import EngineLoop  # noqa: E402
from serving.state import EngineState  # noqa: E402
from tests.support.real_engine import FIXTURES, DataPlane  # noqa: E402

CLUSTER = ClusterConfig(
    NUM_INSTANCES, pages_per_instance=1024, slots=256, ladder=LadderConfig((1, 8), (128,), (8,), prefill_rows=8)
)
WINDOW = 20  # steps; a figure is the median over windows
PARTS = ("manager", "staging", "page tables", "call", "loop", "total")


class Case(NamedTuple):
    name: str
    dop: int
    num_rows: int


CASES = (
    Case("one group of DoP 8, 8 rows", 8, 8),
    Case("one group of DoP 8, 32 rows", 8, 32),
    Case("eight groups of DoP 1, 1 row each", 1, 8),
    Case("eight groups of DoP 1, 4 rows each", 1, 32),
)


class Clock:
    """CPU time by part, one row of sums per window of decode steps."""

    def __init__(self) -> None:
        self.windows: list[dict[str, float]] = []
        self.num_rows: list[int] = []
        self.groups: set[tuple[int, ...]] = set()
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._started_s: float | None = None

    def timed(self, part: str, function: Callable, minus: str | None = None) -> Callable:
        """`minus`: a part timed within this one, to be taken off."""

        def call(*args: Any) -> Any:
            inside, start_s = self._spent[minus] if minus else 0.0, time.thread_time()
            try:
                return function(*args)
            finally:
                self._spent[part] += time.thread_time() - start_s
                if minus:
                    self._spent[part] -= self._spent[minus] - inside

        return call

    def saw_step(self, command: RunDecode) -> None:
        self.num_rows.append(len(command.rows))
        self.groups.add(command.instances)
        if len(self.num_rows) % WINDOW == 0:
            now_s = time.thread_time()
            if self._started_s is not None:
                self.windows.append({**self._spent, "total": now_s - self._started_s})
            self._spent.clear()
            self._started_s = time.thread_time()

    def medians_us(self) -> dict[str, float]:
        for window in self.windows:
            window["loop"] = window["total"] - sum(window[part] for part in PARTS[:4])
        return {part: statistics.median(w[part] for w in self.windows) / WINDOW * 1e6 for part in PARTS}


class TimedExecutor:
    """The executor, taken apart by a clock. Programs that the policy would like as well are not made."""

    def __init__(self, plane: DataPlane, clock: Clock, post: Callable) -> None:
        self._clock, self._inner = clock, plane.executor(post)
        inner = self._inner
        inner._tables.apply = clock.timed("page tables", inner._tables.apply)
        inner._take_deltas = clock.timed("page tables", inner._take_deltas)
        inner._stage = clock.timed("staging", inner._stage, minus="page tables")
        inner._call = clock.timed("call", inner._call)

    def submit(self, command: Any) -> None:
        if isinstance(command, Prepare):
            return
        self._inner.submit(command)
        if isinstance(command, RunDecode):
            self._clock.saw_step(command)

    def close(self) -> None:
        self._inner.close()


class Sink:
    def __init__(self) -> None:
        self.finished = threading.Event()

    def put(self, item: Any, now_us: int) -> None:
        if isinstance(item, Finish):
            self.finished.set()


def run(plane: DataPlane, case: Case, num_steps: int) -> Clock:
    clock, limits = Clock(), LimitsConfig(max_running=case.num_rows)
    manager = Manager(CLUSTER, limits, Elastic(CLUSTER, limits), unmeasured())
    manager.handle = clock.timed("manager", manager.handle)
    engine = EngineLoop(manager, EngineState(kv_token_bytes=1, compiles_after_ready=int))
    asyncio_loop = asyncio.new_event_loop()
    threading.Thread(target=asyncio_loop.run_forever, daemon=True).start()
    engine.start(TimedExecutor(plane, clock, engine.post), (), asyncio_loop)
    for program, instances in plane.programs.ready:
        if program.dop == case.dop and program.phase in (Phase.PREFILL, Phase.DECODE):
            engine.post(ProgramReady(program, instances))
    num_tokens = num_steps if case.dop == 8 else num_steps // NUM_INSTANCES
    sinks = [Sink() for _ in range(case.num_rows)]
    for index, sink in enumerate(sinks):
        prompt = array("i", [(index * 31 + i) % 500 + 2 for i in range(100)])
        engine.arrive(prompt.tobytes(), num_tokens, Sampling(), (), sink)
    for sink in sinks:
        sink.finished.wait()
    engine.close()
    asyncio_loop.call_soon_threadsafe(asyncio_loop.stop)
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="decode steps of a case")
    options = parser.parse_args()
    plane = DataPlane(FIXTURES / "gqa", CLUSTER)
    wanted = [p for p in CLUSTER.ladder.programs() if p.phase in (Phase.PREFILL, Phase.DECODE)]
    everyone = tuple(range(NUM_INSTANCES))
    sets = {1: [(i,) for i in everyone], 8: [everyone]}
    plane.programs.warm_up([(program, instances) for program in wanted for instances in sets[program.dop]])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {load}; us of CPU time per decode step, medians")
    print(f"| case | groups | rows a step | {' | '.join(PARTS)} |")
    print("|---|" + "---:|" * (2 + len(PARTS)))
    for case in CASES:
        clock = run(plane, case, options.steps)
        medians = clock.medians_us()
        figures = [len(clock.groups), statistics.median(clock.num_rows), *(medians[part] for part in PARTS)]
        print(f"| {case.name} | {' | '.join(f'{figure:.0f}' for figure in figures)} |", flush=True)
    plane.programs.close()


if __name__ == "__main__":
    main()
