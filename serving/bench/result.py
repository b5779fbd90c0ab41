"""What a benchmark found, with the field names of `vllm bench serve --save-result`, and the table of it.

Fields of ours beside them begin with `loong_`. What it is not: the picture (`serving/bench/picture.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from loong_jax.config import ConfigError
from serving.bench.runner import Outcome, Run

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, without the first",
    "itl": "Time between tokens",
    "e2el": "Time to the last token",
}
OBJECTIVES = ("ttft", "tpot", "e2el")
DETAILS = (
    "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts",
    "errors",
)  # fmt: skip
"""Fields with an entry for each request, left out unless they are asked for."""


def objectives_of(texts: Sequence[str]) -> dict[str, float]:
    """["ttft:500"] -> {"ttft": 500.0}, in milliseconds. Raises ConfigError."""
    out: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = math.nan
        if name not in OBJECTIVES or not 0 < limit_ms < math.inf:
            names = ", ".join(f"{objective}:MS" for objective in OBJECTIVES)
            raise ConfigError(f"goodput: {text!r} is no objective: {names}, with positive milliseconds")
        out[name] = limit_ms
    return out


def is_good(outcome: Outcome, objectives_ms: Mapping[str, float]) -> bool:
    """Whether a request that succeeded met all objectives."""
    took_s = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.latency_s}
    return all(1e3 * took_s[name] <= limit_ms for name, limit_ms in objectives_ms.items())


def summary(run: Run, *, objectives_ms: Mapping[str, float], percentiles: Sequence[float]) -> dict[str, Any]:
    """All figures of a run. Latencies are of requests that succeeded, `duration` is of the whole run."""
    outcomes = [run.outcomes[index] for index in sorted(run.outcomes)]
    good = [outcome for outcome in outcomes if outcome.success]
    per_s = 1.0 / max(run.duration_s, 1e-9)
    num_input = sum(outcome.num_prompt_tokens for outcome in good)
    num_output = sum(outcome.num_tokens for outcome in good)
    met = sum(is_good(outcome, objectives_ms) for outcome in good)
    values_s = {
        "ttft": [outcome.ttft_s for outcome in good if outcome.pieces],
        "tpot": [outcome.tpot_s for outcome in good if outcome.num_tokens > 1],
        "itl": [gap for outcome in good for gap in outcome.itls_s],
        "e2el": [outcome.latency_s for outcome in good],
    }
    out: dict[str, Any] = {
        "duration": run.duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) * per_s,
        "request_goodput": met * per_s if objectives_ms else None,
        "output_throughput": num_output * per_s,
        "total_token_throughput": (num_input + num_output) * per_s,
        "max_output_tokens_per_s": max(tokens_by_second(good), default=0),
        "max_concurrent_requests": most_at_once(good),
    }
    for name, found in values_s.items():
        out |= _statistics(name, found, percentiles)
    out |= _ours(run, outcomes, good, met if objectives_ms else None)
    return out | _details(run, outcomes)


def _statistics(name: str, values_s: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.asarray(values_s or [0.0])
    out = {f"mean_{name}_ms": values.mean(), f"median_{name}_ms": np.median(values), f"std_{name}_ms": values.std()}
    out |= {f"p{percentile:g}_{name}_ms": np.percentile(values, percentile) for percentile in percentiles}
    return {field: float(value) for field, value in out.items()}


def _ours(run: Run, outcomes: Sequence[Outcome], good: Sequence[Outcome], met: int | None) -> dict[str, Any]:
    judged = [(run.items[index].answer, run.outcomes[index]) for index in sorted(run.outcomes)]
    judged = [(answer, outcome) for answer, outcome in judged if answer is not None and outcome.success]
    right = sum(answer in outcome.text for answer, outcome in judged if answer is not None)
    dops: Counter[str] = Counter()
    for outcome in good:
        dops.update({f"{phase}@{dop}": tokens for (phase, dop), tokens in outcome.dops.items()})
    return {
        "loong_slo_attainment": None if met is None else met / max(1, len(outcomes)),
        "loong_answers_judged": len(judged),
        "loong_answers_right": right,
        "loong_tokens_by_dop": dict(sorted(dops.items())),
        "loong_finish_reasons": dict(Counter(outcome.finish_reason for outcome in good)),
        "loong_cut_off": run.cut_off,
    }


def _details(run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    rows = [
        (o.num_prompt_tokens, o.num_tokens, o.ttft_s, o.itls_s, o.latency_s, o.start_s, o.waited_s, o.text, o.error)
        for o in outcomes
    ]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in DETAILS]
    return dict(zip(DETAILS, columns, strict=True))


def tokens_by_second(outcomes: Sequence[Outcome]) -> list[int]:
    """Generated tokens in each second since the first request was sent."""
    first_s = min((outcome.start_s for outcome in outcomes), default=0.0)
    counts: Counter[int] = Counter()
    for outcome in outcomes:
        for time_s, num in outcome.pieces:
            counts[int(outcome.start_s + time_s - first_s)] += num
    return [counts[second] for second in range(max(counts, default=-1) + 1)]


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Requests open at the same time; one that ends where another begins is over."""
    edges = [(o.start_s, 1) for o in outcomes] + [(o.start_s + o.latency_s, -1) for o in outcomes]
    most = now = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


def table(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> Table:
    """For people: the run, then the latencies."""
    out = Table(title=f"{result['backend']}, {result['dataset']}, {result['num_prompts']} requests", show_header=False)
    out.add_column()
    out.add_column(justify="right")
    rows = {
        "Successful requests": result["completed"],
        "Failed requests": result["failed"],
        "Duration (s)": result["duration"],
        "Input tokens": result["total_input_tokens"],
        "Generated tokens": result["total_output_tokens"],
        "Requests per second": result["request_throughput"],
        "Requests per second within objectives": result["request_goodput"],
        "Generated tokens per second": result["output_throughput"],
        "Tokens per second, input too": result["total_token_throughput"],
        "Most generated tokens in a second": result["max_output_tokens_per_s"],
        "Most requests at once": result["max_concurrent_requests"],
    }
    for words, value in rows.items():
        if value is not None:
            out.add_row(words, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    if result["loong_answers_judged"]:
        out.add_row("Right answers", f"{result['loong_answers_right']} of {result['loong_answers_judged']}")
    for phase_dop, tokens in result["loong_tokens_by_dop"].items():
        phase, dop = phase_dop.split("@")
        out.add_row(f"Tokens of {phase} at DoP {dop}", f"{tokens:,}")
    for name in metrics:
        out.add_section()
        out.add_row(f"[bold]{METRICS[name]}[/bold]", "ms")
        for statistic in ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles)):
            out.add_row(f"  {statistic}", f"{result[f'{statistic}_{name}_ms']:,.2f}")
    return out
