#!/usr/bin/env python3
"""The simulator against a real engine: fit on the first half of a measured run, predict the second half.

    scripts/validate_simulator.py --traces DIR [--plot docs/simulator_vllm.png]

DIR/vllm_measured holds per-request times of a real vLLM (Llama-3.1-8B, one RTX PRO 6000; casys-kaist/LLMServingSim,
MIT). What is known of that engine from the file itself: at most 128 requests run at once (its time series stands at
128), an iteration has 2,048 tokens, decode tokens included (longer prompts take two), and nothing is shared between
prompts. So it is the `chunked` policy on one instance with fused iterations.

The step law has four coefficients: seconds = base + token * prefill tokens + row * decode rows + kv * KV tokens read.
They are fitted on the requests of the first half alone: the time from first to last token of each is the sum of the
iterations between, whose contents the simulation tells; so simulating and fitting take turns until both agree. The
second half is then predicted: its arrivals and lengths go in, its times are only compared with.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig  # noqa: E402
from loong_jax.cost import fit  # noqa: E402
from loong_jax.sim import Outcome, Result, SimConfig, run  # noqa: E402
from loong_jax.sim.metrics import quantile  # noqa: E402
from loong_jax.sim.workloads import Request, Workload  # noqa: E402
from loong_jax.types import ContextForm, Phase  # noqa: E402

FILE = "vllm_measured/RTXPRO6000__Llama-3.1-8B__vllm__requests.jsonl"
MAX_RUNNING, CHUNK_TOKENS, PAGE_TOKENS, POOL_TOKENS = 128, 2048, 16, 600_000
NAMES = ("base_s", "token_s", "row_s", "kv_token_s")
ROUNDS = 12
START = (0.01, 4e-5, 5e-5, 1e-7)  # anything of the right size
TARGETS = {"TPOT": (0.03, None), "E2E": (0.03, 0.08), "TTFT": (0.06, None)}  # of the mean, of P99


class Measured(NamedTuple):
    """One request of the real run; seconds since the first arrival."""

    prompt_len: int
    output_len: int
    arrived_s: float
    first_s: float
    last_s: float


class Iteration(NamedTuple):
    end_us: int
    features: tuple[float, float, float, float]


class IterationTimes:
    """The step law as StepTimes."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = dict(zip(NAMES, coefficients, strict=True))

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        return self.coefficients["base_s"] + self.coefficients["token_s"] * tokens

    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float:
        c = self.coefficients
        return c["base_s"] + c["row_s"] * rows + c["kv_token_s"] * kv_tokens

    def migrate_s(self, tokens: int) -> float:
        raise AssertionError("one instance moves nothing")

    def updated(self, coefficients: dict[str, float]) -> "IterationTimes":
        return IterationTimes([coefficients[name] for name in NAMES])


def read(path: Path) -> list[Measured]:
    """In order of arrival. Arrivals are on the wall clock and the rest on the engine's, so the two are aligned: the
    engine sees a request between two iterations, and the one it saw soonest (of the first half) it saw at once."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["arrival_time"])
    offset_s = max(row["arrival_time"] - row["queued_ts"] for row in rows[: len(rows) // 2]) - rows[0]["arrival_time"]
    return [
        Measured(
            row["input_toks"],
            row["output_toks"],
            row["arrival_time"] - rows[0]["arrival_time"],
            row["first_token_ts"] + offset_s,
            row["last_token_ts"] + offset_s,
        )
        for row in rows
    ]


def simulate(measured: Sequence[Measured], coefficients: Sequence[float]) -> Result:
    requests = tuple(Request(round(m.arrived_s * 1e6), m.prompt_len, m.output_len, 4096) for m in measured)
    ladder = LadderConfig(
        dops=(1,), prefill_tokens=(CHUNK_TOKENS,), decode_rows=(MAX_RUNNING,), prefill_rows=MAX_RUNNING, score_tokens=()
    )
    cluster = ClusterConfig(
        num_instances=1, page_tokens=PAGE_TOKENS, pages_per_instance=POOL_TOKENS // PAGE_TOKENS, slots=MAX_RUNNING,
        ladder=ladder,
    )  # fmt: skip
    limits = LimitsConfig(max_waiting=len(measured), max_running=MAX_RUNNING, chunk_tokens=CHUNK_TOKENS)
    return run(
        SimConfig(
            times=IterationTimes(coefficients), workload=Workload("measured", 1.0, requests), cluster=cluster,
            limits=limits, policy="chunked", fused=True, record=True,
        )
    )  # fmt: skip


def iterations(result: Result) -> list[Iteration]:
    """What each simulated iteration did. Spans that start together are one."""
    held: dict[int, int] = defaultdict(int)  # KV tokens of a request
    out: list[Iteration] = []
    start_us = -1
    for span in result.spans:
        if span.start_us != start_us:
            out.append(Iteration(span.end_us, (1.0, 0.0, 0.0, 0.0)))
            start_us = span.start_us
        base, tokens, rows, kv = out[-1].features
        for request, count in span.rows:
            held[request] += count
            if span.phase is Phase.PREFILL:
                tokens += count
            else:
                rows, kv = rows + 1, kv + held[request]
        out[-1] = Iteration(span.end_us, (base, tokens, rows, kv))
    return out


def fit_first_half(measured: Sequence[Measured]) -> list[float]:
    """Simulate, then fit, and so on; each round goes half the way, because base and rows can stand for each other."""
    half = len(measured) // 2
    coefficients: list[float] = list(START)
    for _ in range(ROUNDS):
        result = simulate(measured, coefficients)
        ran = iterations(result)
        index = {iteration.end_us: i for i, iteration in enumerate(ran)}
        sums = list(accumulate((i.features for i in ran), lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))))
        rows = [
            [b - a for a, b in zip(sums[index[o.first_us]], sums[index[o.last_us]], strict=True)]
            for o in result.outcomes[:half]
        ]
        fitted = fit.relative(rows, [m.last_s - m.first_s for m in measured[:half]])
        coefficients = [(old + new) / 2 for old, new in zip(coefficients, fitted, strict=True)]
    return coefficients


# ---- comparison

Times = dict[str, list[float]]


def of_measured(measured: Sequence[Measured]) -> Times:
    return {
        "TPOT": [(m.last_s - m.first_s) / (m.output_len - 1) for m in measured],
        "E2E": [m.last_s - m.arrived_s for m in measured],
        "TTFT": [m.first_s - m.arrived_s for m in measured],
    }


def of_simulated(outcomes: Sequence[Outcome]) -> Times:
    return {
        "TPOT": [(o.last_us - o.first_us) * 1e-6 / (o.emitted - 1) for o in outcomes],
        "E2E": [(o.last_us - o.arrived_us) * 1e-6 for o in outcomes],
        "TTFT": [(o.first_us - o.arrived_us) * 1e-6 for o in outcomes],
    }


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def p99(values: Sequence[float]) -> float:
    return quantile(sorted(values), 0.99)


def compare(real: Times, simulated: Times) -> list[tuple[str, float, float, float, float | None]]:
    """(what, real, simulated, relative error, allowed)."""
    out = []
    for name, allowed in TARGETS.items():
        for statistic, of, most in (("mean", mean, allowed[0]), ("P99", p99, allowed[1])):
            a, b = of(real[name]), of(simulated[name])
            out.append((f"{statistic} {name}", a, b, b / a - 1, most))
    return out


def print_table(title: str, rows: Sequence[tuple[str, float, float, float, float | None]]) -> bool:
    """Whether every error is allowed."""
    print(f"\n{title}\n{'':10} {'real (s)':>10} {'simulated':>10} {'error':>8} {'allowed':>8}")
    for what, real, simulated, error, allowed in rows:
        limit = "" if allowed is None else f"{allowed:.0%}"
        verdict = "" if allowed is None or abs(error) <= allowed else "  MISSED"
        print(f"{what:10} {real:10.4f} {simulated:10.4f} {error:+8.2%} {limit:>8}{verdict}")
    return all(allowed is None or abs(error) <= allowed for *_, error, allowed in rows)


def draw(real: Times, simulated: Times, half: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=100)
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 3), TARGETS, strict=True):
        axes.plot(real[name], ".", markersize=4, label="real vLLM")
        axes.plot(simulated[name], linewidth=1, label="simulated")
        axes.axvline(half, color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{name} (s); left of the line: fitted")
        axes.set_xlabel("request, by arrival")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder that holds vllm_measured/")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    measured = read(options.traces / FILE)
    half = len(measured) // 2
    coefficients = fit_first_half(measured)
    say("  ".join(f"{name} {value:.3g}" for name, value in zip(NAMES, coefficients, strict=True)))
    outcomes = simulate(measured, coefficients).outcomes
    print_table("first half (fitted)", compare(of_measured(measured[:half]), of_simulated(outcomes[:half])))
    right = print_table("second half (predicted)", compare(of_measured(measured[half:]), of_simulated(outcomes[half:])))
    if options.plot is not None:
        draw(of_measured(measured), of_simulated(outcomes), half, options.plot)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
