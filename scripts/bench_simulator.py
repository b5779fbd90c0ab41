#!/usr/bin/env python3
"""How fast simulations run: manager events per CPU second, and how many times real time.

    scripts/bench_simulator.py [--policies elastic,chunked] [--page-tokens 16] [--json OUT]

Each workload at a rate that the policies can serve, on the simulated machine of the paper (8 A800, 4 instances of tp
2). An event is one call of Manager.handle; the invariants are those that every event checks itself. A second run of the
same simulation with a clock around `handle` says how much of the time is the simulator's own.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loong_jax.manager import Manager  # noqa: E402
from loong_jax.sim import make_workload, run  # noqa: E402
from loong_jax.sim.setups import Setup, make_config, parse_policy  # noqa: E402

CASES = (("mixed", 0.15, 300), ("zipf-1.0", 0.6, 600), ("zipf-1.4", 4.0, 1000), ("sharegpt", 8.0, 500))


def own_share(config) -> float:
    """Share of the run that is not spent in the manager and its policy."""
    inside = 0
    handle = Manager.handle

    def timed(self, event, now_us):
        nonlocal inside
        start_ns = time.process_time_ns()
        commands = handle(self, event, now_us)
        inside += time.process_time_ns() - start_ns
        return commands

    Manager.handle = timed  # type: ignore[method-assign]
    try:
        result = run(config)
    finally:
        Manager.handle = handle  # type: ignore[method-assign]
    return 1 - inside * 1e-9 / result.cpu_s


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="elastic,chunked")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    setup = Setup(page_tokens=options.page_tokens)
    rows = []
    print(f"{'policy':16} {'workload':10}  req/s   events  events/s  tokens/s  x real   own")
    for text in options.policies.split(","):
        for name, rate, num in CASES:
            workload = make_workload(name, rate=rate, num_requests=num, seed=0)
            config = make_config(setup, parse_policy(text, setup), workload)
            result = run(config)
            row = {
                "policy": text,
                "workload": name,
                "rate": rate,
                "events": result.num_events,
                "events_per_s": result.num_events / result.cpu_s,
                "tokens_per_s": sum(o.emitted for o in result.outcomes) / result.cpu_s,
                "x_real": result.sim_s / result.cpu_s,
                "own": own_share(config),
            }
            rows.append(row)
            print(
                f"{text:16} {name:10} {rate:6.2f} {row['events']:8d} {row['events_per_s']:9,.0f} "
                f"{row['tokens_per_s']:9,.0f} {row['x_real']:7.0f} {row['own']:5.0%}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
