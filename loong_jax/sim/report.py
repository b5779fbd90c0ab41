"""A result as plain data for JSON: what was simulated, what users felt, and what a plot needs.

What it is not: a table for people (`serving/simulate.py`) or a picture (`picture.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from loong_jax.sim.config import Result
from loong_jax.sim.metrics import P90, p90_goodput, tpot_s, ttft_s
from loong_jax.sim.workloads import Workload


def report(
    result: Result, *, policy: str, workload: Workload, seed: int, bounds: tuple[float, float]
) -> dict[str, Any]:
    """`bound_share`: requests per second that met the SLO, as a share of the fluid bound (`bounds`: of
    `setups.bounds_of`). Under `requests`, one column for each field, times in seconds (-1: there is none)."""
    done = [o for o in result.outcomes if o.status == "finished"]
    return {
        "policy": policy,
        "workload": workload.name,
        "offered_rate": workload.rate,
        "seed": seed,
        **msgspec.to_builtins(result.summary),
        "bound": bounds[0],
        "bound_full_group": bounds[1],
        "bound_share": result.summary.goodput / bounds[0],
        "event_log_hash": result.event_log_hash,
        "num_events": result.num_events,
        "num_steps": result.num_steps,
        "sim_s": result.sim_s,
        "cpu_s": result.cpu_s,
        "requests": {
            "arrived_s": [o.arrived_us * 1e-6 for o in result.outcomes],
            "prompt_len": [o.prompt_len for o in result.outcomes],
            "output_len": [o.output_len for o in result.outcomes],
            "ttft_s": [ttft_s(o) if o.first_us >= 0 else -1.0 for o in result.outcomes],
            "tpot_s": [tpot_s(o) if o.status == "finished" else -1.0 for o in result.outcomes],
            "status": [o.status for o in result.outcomes],
        },
        "tokens_per_s": sum(o.emitted for o in done) / result.sim_s if result.sim_s > 0 else 0.0,
    }


def sweep(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several reports, and of each policy and workload the largest rate at which nine tenths of the requests meet the
    SLO, among the rates that were tried."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        curve = curves.setdefault(run["workload"], {}).setdefault(run["policy"], [])
        curve.append((run["offered_rate"], run["slo_attainment"]))
    goodput = {
        workload: {policy: p90_goodput(points) for policy, points in of.items()} for workload, of in curves.items()
    }
    return {"runs": list(runs), "p90_goodput": goodput, "attainment_wanted": P90}
