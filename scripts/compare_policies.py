#!/usr/bin/env python3
"""Policies against each other in the simulator: eight A800 with a 7B model, as in LoongServe's evaluation.

    scripts/compare_policies.py ablation --results FILE              the paper's figure 12: goodput without elasticity
    scripts/compare_policies.py grid --results FILE [--traces DIR]   workloads x loads: SLO attainment
    scripts/compare_policies.py page --results FILE --out docs       docs/comparison.md and docs/comparison.png

Every run is a line of FILE (JSON), so a run that is there is not done again; `--again POLICY` forgets a policy's.
`--policies`, `--workloads`, `--loads` take some of them. Loads are shares of the fluid bound of the very requests.
What it is not: the elastic policy's own measurements, or a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from loong_jax.policy import POLICIES  # noqa: E402
from loong_jax.sim import Workload, make_workload, run  # noqa: E402
from loong_jax.sim.metrics import P90  # noqa: E402
from loong_jax.sim.setups import Setup, bounds_of, make_config, parse_policy  # noqa: E402

SETUP = Setup(subsets=True)
SEED = 0


class Case(NamedTuple):
    """A workload's name, and how its requests arrive."""

    name: str
    arrivals: str = "poisson"

    @property
    def text(self) -> str:
        return self.name if self.arrivals == "poisson" else f"{self.name}, {self.arrivals}"


WORKLOADS = (
    Case("lveval"), Case("mixed"), Case("zipf-1.0"), Case("leval"), Case("mixed", "bursts"), Case("mooncake"),
    Case("zipf-1.2"), Case("zipf-1.2", "bursts"), Case("arxiv"), Case("zipf-1.4"), Case("azure"), Case("sharegpt"),
)  # fmt: skip
LOADS = (0.15, 0.3, 0.45, 0.6, 0.75)
GRID_S, LEAST_REQUESTS, MOST_REQUESTS = 100.0, 150, 600
"""As many requests as come in so long, within bounds: several times the 15 s that a first token may take."""

SYSTEMS = (
    "loongserve_2024", "loongserve", "chunked@1x8/1024", "chunked@1x8/4096", "fixed_sp/1024", "replicas/1024",
    "static_tp@1x8", "disaggregated@2x4",
)  # fmt: skip
"""Baselines of today on the devices that they are meant for, /TOKENS: with that chunk; and LoongServe as released."""

ELASTIC = "elastic"

PAPER = {
    "loongserve_2024": (1.122, 2.925, 8.757),
    "static_tp_2024@1x8": (0.405, 1.355, 5.723),
    "fixed_sp_2024": (0.481, 1.478, 5.447),
    "replicas_2024": (0.360, 1.289, 5.000),
}
"""P90 goodput of figure 12, requests per second, for Zipf 1.0, 1.2 and 1.4."""
ZIPF = ("zipf-1.0", "zipf-1.2", "zipf-1.4")
ABLATION_S, ABLATION_REQUESTS, ABLATION_ROUNDS = 150.0, 600, 5
"""Requests of so many seconds, and at least so many."""


class Results:
    """The lines of a file, by what was run."""

    def __init__(self, path: Path, again: Iterable[str]) -> None:
        self._path, self._found = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in map(json.loads, lines):
            if line["policy"].split("@")[0].split("/")[0] not in again:
                self._found[self._key(line)] = line
        if lines and again:
            path.write_text("".join(f"{json.dumps(line)}\n" for line in self._found.values()))

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[object, ...]:
        return line["kind"], line["policy"], line["workload"], line["load"], line["num_requests"]

    def get(self, line: dict[str, Any]) -> dict[str, Any] | None:
        return self._found.get(self._key(line))

    def add(self, line: dict[str, Any]) -> None:
        self._found[self._key(line)] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        return (line for line in self._found.values() if line["kind"] == kind)


def simulate(policy: str, workload: Workload) -> dict[str, Any]:
    text, _, chunk = policy.partition("/")
    setup = msgspec.structs.replace(SETUP, chunk_tokens=int(chunk)) if chunk else SETUP
    start_s = time.process_time()
    result = run(make_config(setup, parse_policy(text, setup), workload))
    summary = result.summary
    return {
        "rate": workload.rate,
        "attainment": summary.slo_attainment,
        "deciles": list(summary.attainment_by_decile),
        "unfinished": summary.num_requests - summary.finished,
        "ttft_p50_s": summary.ttft_s.p50,
        "ttft_p99_s": summary.ttft_s.p99,
        "tpot_p90_s": summary.tpot_s.p90,
        "token_s": summary.normalised_token_s,
        "cpu_s": time.process_time() - start_s,
    }


def of_case(case: Case, rate: float, num_requests: int, traces: Path | None) -> Workload:
    return make_workload(
        case.name, rate=rate, num_requests=num_requests, seed=SEED, arrivals=case.arrivals, traces=traces
    )


def do(results: Results, wanted: dict[str, Any], case: Case, rate: float, traces: Path | None) -> dict[str, Any]:
    """The line of `wanted`, simulated if it is not there."""
    line = results.get(wanted)
    if line is None:
        line = {**wanted, **simulate(wanted["policy"], of_case(case, rate, wanted["num_requests"], traces))}
        results.add(line)
        print(
            f"{line['workload']:18s} {line['policy']:20s} {line['load']:5.2f} of the bound, {rate:6.2f}/s: "
            f"{line['attainment']:6.1%} meet the SLO, worst tenth {min(line['deciles']):6.1%} ({line['cpu_s']:.0f} s)",
            flush=True,
        )
    return line


def bound_of(case: Case, traces: Path | None, num_requests: int = 2000) -> float:
    """Requests per second, each on the whole group or on less, whichever costs less."""
    return bounds_of(SETUP, of_case(case, 1.0, num_requests, traces))[0]


def ablation(results: Results, policies: Iterable[str]) -> None:
    """The rate at which nine tenths meet the SLO, by bisection between nothing and the bound."""
    for workload in ZIPF:
        case = Case(workload)
        bound = bound_of(case, None)
        for policy in policies:
            low, high = 0.0, 1.0
            for _ in range(ABLATION_ROUNDS):
                load = (low + high) / 2
                wanted = {
                    "kind": "ablation", "policy": policy, "workload": workload, "load": load,
                    "num_requests": max(ABLATION_REQUESTS, round(ABLATION_S * load * bound)),
                }  # fmt: skip
                line = do(results, wanted, case, load * bound, None)
                if line["attainment"] >= P90:
                    low = load
                else:
                    high = load


def grid(
    results: Results, policies: Iterable[str], cases: Iterable[Case], loads: Iterable[float], traces: Path | None
) -> None:
    for case in cases:
        bound = bound_of(case, traces)
        for load in loads:
            num_requests = round(min(MOST_REQUESTS, max(LEAST_REQUESTS, GRID_S * load * bound)))
            for policy in policies:
                wanted = {
                    "kind": "grid", "policy": policy, "workload": case.text, "load": load,
                    "num_requests": num_requests,
                }  # fmt: skip
                do(results, wanted, case, load * bound, traces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "grid", "page"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--traces", type=Path, help="folder of trace files; without it the workloads made of them wait")
    parser.add_argument("--policies", help="such as elastic,chunked@1x8/1024")
    parser.add_argument("--workloads", help="such as zipf-1.0,mixed")
    parser.add_argument("--loads", help="such as 0.3,0.6")
    parser.add_argument("--again", default="", help="policies whose results are forgotten")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    results = Results(args.results, set(filter(None, args.again.split(","))))
    if args.what == "page":
        from comparison.page import write_page

        write_page(list(results.of("ablation")), list(results.of("grid")), args.out)
        return
    default = PAPER if args.what == "ablation" else SYSTEMS
    elastic = [ELASTIC] if ELASTIC in POLICIES else []
    policies = args.policies.split(",") if args.policies else [*elastic, *default]
    if args.what == "ablation":
        ablation(results, policies)
        return
    names = args.workloads.split(",") if args.workloads else [case.name for case in WORKLOADS]
    with_files = args.traces is not None
    cases = [c for c in WORKLOADS if c.name in names and (with_files or c.name not in ("azure", "mooncake", "arxiv"))]
    grid(results, policies, cases, [float(x) for x in args.loads.split(",")] if args.loads else LOADS, args.traces)


if __name__ == "__main__":
    main()
