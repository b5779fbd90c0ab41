"""A benchmark as a PNG: its requests over time, throughput, and the distributions of its latencies.

Needs matplotlib (the extra `plots`), imported when a picture is drawn. What it is not: the figures themselves
(`serving/bench/result.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loong_jax.config import ConfigError
from serving.bench.result import tokens_by_second
from serving.bench.runner import Outcome, Run

MAX_BARS = 2000
"""Requests that the picture shows one by one."""

_WAIT, _PREFILL, _DECODE, _FAILED, _LIMIT = "#d8dde1", "#e2a24c", "#3f7fb5", "#b5403f", "#b5403f"
_DPI = 110


def draw(run: Run, result: Mapping[str, Any], objectives_ms: Mapping[str, float], path: Path) -> None:
    """Raises ConfigError where matplotlib is missing, OSError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("plot: needs matplotlib; pip install 'loong-jax[bench]'") from None
    outcomes = [run.outcomes[index] for index in sorted(run.outcomes)]
    good = [outcome for outcome in outcomes if outcome.success]
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(result), fontsize=11)
    (over_time, rates), (ttft, tpot) = figure.subplots(2, 2)
    _draw_requests(over_time, outcomes[:MAX_BARS])
    _draw_rates(rates, good)
    both = {"TTFT": [o.ttft_s for o in good], "whole answer": [o.latency_s for o in good]}
    limits = {"TTFT": objectives_ms.get("ttft"), "whole answer": objectives_ms.get("e2el")}
    _draw_shares(ttft, both, limits, "seconds, log scale", 1.0)
    gaps = [gap for outcome in good for gap in outcome.itls_s]
    each = {"between tokens": gaps, "per token of a request": [o.tpot_s for o in good if o.num_tokens > 1]}
    _draw_shares(tpot, each, {"per token of a request": objectives_ms.get("tpot")}, "milliseconds, log scale", 1e3)
    figure.savefig(path, dpi=_DPI, format="png")


def title(result: Mapping[str, Any]) -> str:
    words = [
        f"{result['backend']}, {result['dataset']}: {result['completed']} of {result['num_prompts']} requests",
        f"{result['request_throughput']:.2f} requests/s",
        f"{result['output_throughput']:,.0f} generated and {result['total_token_throughput']:,.0f} tokens/s",
    ]
    if result["request_goodput"] is not None:
        words.append(f"{result['request_goodput']:.2f} requests/s within objectives")
    if result["loong_answers_judged"]:
        words.append(f"{result['loong_answers_right']} of {result['loong_answers_judged']} answers right")
    return ", ".join(words)


def _draw_requests(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """A line for each request, in the order of sending: to its first token, then to its last."""
    for phase, colour in (("to the first token", _PREFILL), ("to the last token", _DECODE)):
        first = colour == _PREFILL
        starts = [o.start_s + (0.0 if first else o.ttft_s) for o in outcomes]
        widths = [o.ttft_s if first else o.latency_s - o.ttft_s for o in outcomes]
        axes.barh(range(len(outcomes)), widths, left=starts, height=0.9, color=colour, label=phase)
    waiting = [o.waited_s for o in outcomes]
    if max(waiting, default=0.0) > 0.01:
        starts = [o.start_s - o.waited_s for o in outcomes]
        axes.barh(range(len(outcomes)), waiting, left=starts, height=0.9, color=_WAIT, label="not yet sent")
    failed = [(o.start_s + o.latency_s, row) for row, o in enumerate(outcomes) if not o.success]
    if failed:
        axes.scatter(*zip(*failed, strict=True), marker="x", s=18, color=_FAILED, label="failed", zorder=3)
    axes.invert_yaxis()
    axes.set(title="Requests", xlabel="seconds", ylabel="request")
    if outcomes:
        axes.legend(loc="upper right", fontsize=8)


def _draw_rates(axes: Any, good: Sequence[Outcome]) -> None:
    counts = tokens_by_second(good)
    axes.stairs(counts, range(len(counts) + 1), fill=True, color=_DECODE, alpha=0.6)
    first_s = min((o.start_s for o in good), default=0.0)
    edges = sorted([(o.start_s - first_s, 1) for o in good] + [(o.start_s + o.latency_s - first_s, -1) for o in good])
    open_now, times, opened = 0, [0.0], [0]
    for time_s, change in edges:
        open_now += change
        times.append(time_s)
        opened.append(open_now)
    other = axes.twinx()
    other.step(times, opened, where="post", color="black", linewidth=1)
    axes.set(title="Generated tokens each second (bars), open requests (line)", xlabel="seconds", ylabel="tokens")
    other.set(ylabel="requests")
    other.set_ylim(bottom=0)


def _draw_shares(
    axes: Any, series: Mapping[str, Sequence[float]], limits_ms: Mapping[str, float | None], unit: str, scale: float
) -> None:
    """The share of values up to each value."""
    for index, (name, values) in enumerate(series.items()):
        ordered = sorted(scale * max(value, 1e-6) for value in values)
        if not ordered:
            continue
        colour = (_PREFILL, _DECODE)[index]
        axes.step(
            ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", color=colour, label=name
        )
        limit_ms = limits_ms.get(name)
        if limit_ms is not None:
            label = f"objective of {limit_ms:g} ms"
            axes.axvline(scale * limit_ms / 1e3, color=_LIMIT, linestyle="--", linewidth=1, label=label)
    axes.set_xscale("log")
    axes.set(title=", ".join(series), xlabel=unit, ylabel="share of " + ("requests" if scale == 1 else "all"))
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    if any(series.values()):
        axes.legend(loc="lower right", fontsize=8)
