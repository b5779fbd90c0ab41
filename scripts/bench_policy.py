#!/usr/bin/env python
"""CPU time of the elastic policy's decisions, and what contiguous batches lose against all partitions.

    scripts/bench_policy.py --results FILE [--png docs/policy_time.png]
    scripts/bench_policy.py --gap

Decode-only: plans of steady decoding, by running rows. Four steps: plans of a simulated overload, by waiting requests
and instances, while the line is within a tenth of its length, of as many overloads as it takes. Thread CPU time of
`Policy.plan` alone. Each case is a line of FILE (JSON), and is not measured again.
What it is not: the manager's part (`scripts/bench_engine_thread.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from loong_jax.config import ClusterConfig, LimitsConfig  # noqa: E402
from loong_jax.cost import CostModel  # noqa: E402
from loong_jax.cost.presets import cost_for  # noqa: E402
from loong_jax.policy.batch import INFINITE, Batching  # noqa: E402
from loong_jax.policy.elastic import Elastic  # noqa: E402
from loong_jax.sim import SimConfig, run, sim_cluster  # noqa: E402
from loong_jax.sim.workloads import Request, Workload, make_workload  # noqa: E402
from loong_jax.types import Plan, View  # noqa: E402
from tests.support.partitions import Case, all_partitions  # noqa: E402

Wanted = Callable[[View, Plan], bool]


class Enough(Exception):
    """So many plans are measured, or no more will come."""


class Timed(Elastic):
    """Seconds of each plan for which `wanted(view, plan)`. Raises Enough after `num_plans`."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig, wanted: Wanted, num_plans: int) -> None:
        super().__init__(cluster, limits)
        self.wanted, self.num_plans = wanted, num_plans
        self.times_s: list[float] = []

    def plan(self, view: View, cost: CostModel) -> Plan:
        start_s = time.thread_time()
        plan = super().plan(view, cost)
        seconds = time.thread_time() - start_s
        if self.wanted(view, plan):
            self.times_s.append(seconds)
            if len(self.times_s) == self.num_plans:
                raise Enough
        return plan


def measure(workload: Workload, instances: int, wanted: Wanted, num_plans: int) -> list[float]:
    """Sorted seconds of so many plans."""
    made: list[Timed] = []

    def policy(cluster: ClusterConfig, limits: LimitsConfig) -> Timed:
        made.append(Timed(cluster, limits, wanted, num_plans))
        return made[0]

    limits = LimitsConfig(max_waiting=1 << 20, max_running=8192, chunk_tokens=1 << 20)
    cluster = sim_cluster(instances, pool_tokens=2_000_000, tp=2)
    ladder = msgspec.structs.replace(cluster.ladder, decode_rows=(1, 32, 512, 4096))
    cluster = msgspec.structs.replace(cluster, slots=8192, ladder=ladder)
    cost = cost_for("A800", "lwm-7b", 2, instances)
    with contextlib.suppress(Enough):
        run(SimConfig(times=cost, workload=workload, cluster=cluster, limits=limits, policy=policy))
    return sorted(made[0].times_s)


def decode_only(rows: int, num_plans: int = 400) -> list[float]:
    """All rows run; then steps alone."""
    requests = tuple(Request(0, 64, 100_000, 1 << 17) for _ in range(rows))

    def wanted(view: View, plan: Plan) -> bool:
        return bool(plan.decodes) and not plan.prefills and not view.waiting and all(r.running for r in view.active)

    return measure(Workload("decode", 1.0, requests), 8, wanted, num_plans)


def four_steps(waiting: int, instances: int, num_plans: int = 100) -> list[float]:
    """Bursts that nobody could serve in time: the line stays long."""
    times: list[float] = []
    seed = 0
    while len(times) < num_plans:
        drawn = make_workload("zipf-1.2", rate=1.0, num_requests=waiting + waiting // 4, seed=seed).requests
        requests = tuple(Request(0, r.prompt_len, r.output_len, r.max_tokens) for r in drawn)
        long_enough = False
        gc.collect()  # what the burst before left is not this one's

        def wanted(view: View, plan: Plan) -> bool:
            nonlocal long_enough
            long_enough |= len(view.waiting) >= waiting
            if long_enough and len(view.waiting) < 0.9 * waiting:
                raise Enough
            return 0.9 * waiting <= len(view.waiting) <= 1.1 * waiting and bool(plan.prefills)

        times += measure(Workload("burst", 1.0, requests), instances, wanted, num_plans - len(times))
        seed += 1
    return sorted(times)


def gap(tight: bool, num: int = 2000) -> list[float]:
    """Of each random instance that can be served, how much more than the best of all partitions the contiguous ones
    cost. `tight`: instances have room for some of the requests, the fullest comes first."""
    out = []
    for seed in range(num):
        rng = random.Random(seed)
        case = Case(rng, max_requests=5, max_instances=4, simple=True)
        if tight:
            case.free = sorted(rng.randint(0, 2 * sum(case.pages) // case.m) for _ in range(case.m))
        if all_partitions(case) == INFINITE:
            continue
        found = Batching(case.work, case.pages, case.slots, case.step_s, case.price)
        out.append(found.costs[case.num] / all_partitions(case) - 1)
    return sorted(out)


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Results:
    """(p50, p99) seconds of each case, by (waiting or rows, instances); 0 instances: decode-only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        self.cases = {(size, instances): (p50, p99) for size, instances, p50, p99 in lines}

    def measure(self, size: int, instances: int) -> str:
        """The case as text, p50 and p99 in ms."""
        if (size, instances) not in self.cases:
            times = four_steps(size, instances) if instances else decode_only(size)
            self.cases[size, instances] = p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
            with self._path.open("a") as file:
                file.write(json.dumps((size, instances, p50, p99)) + "\n")
        p50, p99 = self.cases[size, instances]
        return f"{size:6} {instances:3} {p50 * 1e3:9.4f} {p99 * 1e3:9.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="where measurements are kept")
    parser.add_argument("--png", type=Path, help="where to draw the growth")
    parser.add_argument("--gap", action="store_true", help="measure the gap to all partitions instead")
    args = parser.parse_args()
    if args.gap:
        for tight in (False, True):
            gaps = [g for g in gap(tight) if g < INFINITE]
            exact = sum(g < 1e-9 for g in gaps) / len(gaps)
            print(f"{'little' if tight else 'ample'} memory, {len(gaps)} instances: {exact:.1%} equal,", end=" ")
            print(f"mean {sum(gaps) / len(gaps):.3%}, p99 {quantile(gaps, 0.99):.2%}, max {gaps[-1]:.2%}")
        return
    if args.results is None:
        parser.error("--results FILE is needed")
    results = Results(args.results)
    print("rows that decode (0) or requests that wait, instances: p50, p99 in ms")
    for rows in (16, 256, 1024, 4096):
        print(results.measure(rows, 0), flush=True)
    for waiting, instances in ((100, 8), (1000, 8), (10_000, 64)):
        print(results.measure(waiting, instances), flush=True)
    if args.png:
        draw(results.cases, args.png)


def draw(cases: dict[tuple[int, int], tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axes, instances, mark, scale in ((left, 0, "o", 1e6), (right, 8, "o", 1e3), (right, 64, "s", 1e3)):
        sizes = sorted(size for size, num in cases if num == instances)
        for index, label in enumerate(("p50", "p99")):
            times = [cases[size, instances][index] * scale for size in sizes]
            text = f"{label}, {instances} instances" if instances else label
            axes.plot(sizes, times, marker=mark, label=text)
    left.set(xscale="log", yscale="log", xlabel="running rows", ylabel="us", title="a decode-only decision")
    right.set(xscale="log", yscale="log", xlabel="waiting requests", ylabel="ms", title="all four steps")
    left.plot([256, 4096], [30, 150], "r_", markersize=16, label="aim (p50)")
    right.plot([1000, 10_000], [1.5, 15], "r_", markersize=16, label="aim (p99)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
