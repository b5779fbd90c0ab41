#!/usr/bin/env python3
"""Short prompts and prompts of a million tokens on one machine: the tails of both, against what queueing allows.

    scripts/bench_tails.py --traces DIR --results FILE [--workloads azure,mooncake] [--loads 0.25,...] [--seeds 0]
    scripts/bench_tails.py --results FILE --png docs/policy_tails.png     a table and a picture of what was run

Eight instances of two A800 (7B), one prompt of a hundred a million tokens long; loads are shares of the fluid bound of
the very requests. Beside each run: the same short prompts without long ones, at the same rate; and a lower bound of the
long ones' median: each on all eight instances, in order of arrival, with nothing else to do. The unit of "alone" is the
simulated time of one long prompt that has all eight. Every run is a line of FILE (JSON), and is not done again.
What it is not: a comparison of policies under an SLO (`scripts/compare_policies.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from loong_jax.sim import make_workload, run  # noqa: E402
from loong_jax.sim.setups import Setup, bounds_of, make_config, parse_policy  # noqa: E402
from loong_jax.sim.workloads import Request, Workload  # noqa: E402

SETUP = Setup(instances=8, tp=2)
LONG = 900_000
"""Tokens; shorter ones are short."""
LOADS = (0.25, 0.4, 0.6, 0.8)


def simulate(policy: str, workload: Workload) -> dict[str, Any]:
    """Seconds to the first token of short and long ones."""
    result = run(make_config(SETUP, parse_policy(policy, SETUP), workload))
    ttft = [(o.prompt_len, (o.first_us - o.arrived_us) * 1e-6 if o.first_us >= 0 else None) for o in result.outcomes]
    return {
        "short": sorted(s for n, s in ttft if n < LONG and s is not None),
        "long": sorted(s for n, s in ttft if n >= LONG and s is not None),
        "unfinished": sum(o.status != "finished" for o in result.outcomes),
    }


@cache
def alone_on_all_s() -> float:
    config = make_config(SETUP, parse_policy("elastic", SETUP), Workload("alone", 1.0, (Request(0, 1_000_000, 2, 16),)))
    ladder = msgspec.structs.replace(config.cluster.ladder, dops=(1, SETUP.instances))  # none that leaves some out
    cluster = msgspec.structs.replace(config.cluster, ladder=ladder)
    (outcome,) = run(msgspec.structs.replace(config, cluster=cluster)).outcomes
    return outcome.first_us * 1e-6


def queued_median(arrivals_s: Sequence[float], alone_s: float) -> float:
    """The median of long ones that have all instances, one at a time, in order of arrival."""
    free_s, out = 0.0, []
    for arrived_s in arrivals_s:
        free_s = max(free_s, arrived_s) + alone_s
        out.append(free_s - arrived_s)
    return median(out)


class Bench:
    def __init__(self, path: Path, traces: Path | None) -> None:
        self._path, self._traces = path, traces
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def _workload(self, name: str, rate: float, num: int, seed: int) -> Workload:
        return make_workload(name, rate=rate, num_requests=num, seed=seed, traces=self._traces)

    def do(self, policy: str, name: str, load: float, num: int, seed: int) -> dict[str, Any]:
        key = {"policy": policy, "workload": name, "load": load, "num": num, "seed": seed}
        found = next((line for line in self.lines if key.items() <= line.items()), None)
        if found is None:
            found = {**key, **self._simulated(policy, name, load, num, seed)}
            self.lines.append(found)
            with self._path.open("a") as file:
                file.write(json.dumps(found) + "\n")
        print(row(found), flush=True)
        return found

    def _simulated(self, policy: str, name: str, load: float, num: int, seed: int) -> dict[str, Any]:
        bound = bounds_of(SETUP, self._workload(f"{name}+1m", 1.0, num, seed))[0]
        both = self._workload(f"{name}+1m", load * bound, num, seed)
        only_short = Workload(name, both.rate, tuple(r for r in both.requests if r.prompt_len < LONG))
        found, without = simulate(policy, both), simulate(policy, only_short)
        alone_s = alone_on_all_s()
        arrivals_s = [r.arrived_us * 1e-6 for r in both.requests if r.prompt_len >= LONG]
        return {
            "rate": both.rate,
            "num_long": len(arrivals_s),
            "short_p50_s": at(found["short"], 0.5),
            "short_p99_s": at(found["short"], 0.99),
            "without_p99_s": at(without["short"], 0.99),
            "long_median_s": median(found["long"]) if found["long"] else None,
            "alone_s": alone_s,
            "queued_median_s": queued_median(arrivals_s, alone_s),
            "unfinished": found["unfinished"],
        }


def at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(line: dict[str, Any]) -> str:
    short, without, alone = line["short_p99_s"], line["without_p99_s"], line["alone_s"]
    return (
        f"| {line['workload']} | {line['policy']} | {line['load']:.2f} | {line['num']}, {line['seed']} "
        f"| {line['num_long']} | {line['short_p50_s']:.3f} | {short:.3f} ({short / without:.2f}) | {without:.3f} "
        f"| {line['long_median_s']:.1f} ({line['long_median_s'] / alone:.2f}) "
        f"| {line['queued_median_s']:.1f} ({line['queued_median_s'] / alone:.2f}) | {line['unfinished']} |"
    )


HEAD = (
    "| lengths | policy | load | requests, seed | long | short p50, s | short p99, s | without long, p99 "
    "| long median, s (times alone) | by queueing alone | unfinished |\n|" + " --- |" * 11
)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    chosen = [line for line in lines if line["policy"] == "elastic" and line["seed"] == 0]
    for name, colour in (("azure", "#1b6ca8"), ("mooncake", "#c1440e")):
        of = sorted((x for x in chosen if x["workload"] == name), key=lambda x: (x["load"], -x["num"]))
        of = [x for i, x in enumerate(of) if not i or of[i - 1]["load"] != x["load"]]
        loads = [x["load"] for x in of]
        axes[0].plot(loads, [x["short_p99_s"] for x in of], marker="o", color=colour, label=f"{name}, beside long ones")
        axes[0].plot(loads, [x["without_p99_s"] for x in of], "--", color=colour, label=f"{name}, without them")
        axes[1].plot(loads, [x["long_median_s"] / x["alone_s"] for x in of], marker="o", color=colour, label=name)
        bound = [x["queued_median_s"] / x["alone_s"] for x in of]
        axes[1].plot(loads, bound, ":", color=colour, label=f"{name}, by queueing alone")
    axes[0].set(yscale="log", ylabel="s", title="short prompts: P99 to the first token")
    axes[1].set(ylabel="times alone", title="long prompts: median to the first token")
    for each in axes:
        each.set_xlabel("load, as a share of the fluid bound")
        each.grid(alpha=0.3)
        each.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--traces", type=Path, help="folder of trace files")
    parser.add_argument("--workloads", default="azure,mooncake")
    parser.add_argument("--policies", default="elastic")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--png", type=Path, help="draw what FILE holds, and run nothing")
    args = parser.parse_args()
    bench = Bench(args.results, args.traces)
    print(HEAD)
    if args.png:
        for line in bench.lines:
            print(row(line))
        draw(bench.lines, args.png)
        return
    for load in map(float, args.loads.split(",")):
        for name in args.workloads.split(","):
            for policy in args.policies.split(","):
                for seed in map(int, args.seeds.split(",")):
                    bench.do(policy, name, load, args.num_requests, seed)


if __name__ == "__main__":
    main()
