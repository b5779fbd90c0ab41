"""Pictures of simulations: who ran where over time, and latencies and SLO attainment of one run or a sweep.

Needs matplotlib (the extra "plots"), which is imported when a picture is drawn: simulating does not.
What it is not: the data (`report.py`, `trace.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loong_jax.config import ConfigError
from loong_jax.sim.trace import Span
from loong_jax.types import Phase

MAX_SPANS = 100_000
"""Steps that a picture shows."""

_COLOURS = {Phase.MIGRATE: "#111111", Phase.COPY: "#555555"}
_GREYS = ("#e3e9ed", "#c9d3da", "#a9b8c2", "#8599a6")
_DPI = 110
_LABELLED = 0.012  # of the width: a bar that is wider has room for its DoP


class Bar(NamedTuple):
    """Steps of one kind in a row: `what` is the request of a prefill, the shade of a decode."""

    start_us: int
    end_us: int
    instances: tuple[int, ...]
    phase: Phase
    what: int


def bars(spans: Sequence[Span]) -> list[Bar]:
    """Steps joined with those that follow on the same instances, where they would look the same."""
    shown = spans[:MAX_SPANS]
    most_rows = max((len(span.rows) for span in shown if span.phase is Phase.DECODE), default=1)
    if not shown:
        return []
    gap_us = (max(span.end_us for span in shown) - shown[0].start_us) // 500
    out: list[Bar] = []
    last: dict[tuple[int, ...], int] = {}
    for span in shown:
        what = -1
        if span.phase is Phase.PREFILL:
            what = max(span.rows, key=lambda row: row[1])[0]
        elif span.phase is Phase.DECODE:
            what = (len(_GREYS) * len(span.rows) - 1) // most_rows
        index = last.get(span.instances, -1)
        before = out[index] if index >= 0 else None
        same = before is not None and (before.phase, before.what) == (span.phase, what)
        if before is not None and same and span.start_us - before.end_us <= gap_us:
            out[index] = before._replace(end_us=span.end_us)
        else:
            last[span.instances] = len(out)
            out.append(Bar(span.start_us, span.end_us, span.instances, span.phase, what))
    return out


def draw_timeline(spans: Sequence[Span], num_instances: int, path: Path) -> None:
    """Instances over time: prefill in the colour of its largest request, decode in grey, darker with more rows. A group
    is one bar over its instances where they are neighbours; its DoP stands in the bar where there is room."""
    figure_of, rectangle = _matplotlib()
    shown = bars(spans)
    if not shown:
        raise ConfigError("timeline: there are no steps to draw")
    figure = figure_of(figsize=(14, 1.2 + 0.6 * num_instances), dpi=_DPI)
    axes = figure.add_subplot()
    first_s, last_s = shown[0].start_us * 1e-6, max(bar.end_us for bar in shown) * 1e-6
    for bar in shown:
        start_s, length_s = bar.start_us * 1e-6, (bar.end_us - bar.start_us) * 1e-6
        for low, high in _neighbours(bar.instances):
            at, height = (start_s, low - 0.45), high - low + 0.9
            axes.add_patch(rectangle(at, length_s, height, facecolor=_colour(bar), linewidth=0))
            if length_s > _LABELLED * (last_s - first_s):
                middle = (start_s + length_s / 2, (low + high) / 2)
                axes.text(*middle, f"x{len(bar.instances)}", ha="center", va="center", fontsize=6)
    axes.set_xlim(first_s, last_s)
    axes.set_ylim(-0.6, num_instances - 0.4)
    axes.set_yticks(range(num_instances), [f"instance {i}" for i in range(num_instances)])
    axes.set_xlabel(
        "time (s). colours: requests in prefill; grey: decode, darker with more rows; black: migration; xN: DoP"
    )
    figure.tight_layout()
    figure.savefig(path)


def draw_sweep(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """SLO attainment over the rate, a line for each policy; and of the highest rate, by length decile."""
    figure_of, _ = _matplotlib()
    figure = figure_of(figsize=(12, 4.5), dpi=_DPI)
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(run["policy"] for run in runs):
        points = sorted((r for r in runs if r["policy"] == policy), key=lambda r: r["offered_rate"])
        rates = [p["offered_rate"] for p in points]
        left.plot(rates, [100 * p["slo_attainment"] for p in points], marker="o", label=policy)
        last = points[-1]
        deciles = range(1, len(last["attainment_by_decile"]) + 1)
        label = f"{policy} at {last['offered_rate']:g}/s"
        right.plot(deciles, [100 * share for share in last["attainment_by_decile"]], marker="o", label=label)
    left.axhline(90, color="grey", linewidth=0.8, linestyle="--")
    right.axhline(80, color="grey", linewidth=0.8, linestyle="--")
    left.set_xlabel("requests per second")
    right.set_xlabel("decile of prompt lengths, shortest first")
    for axes in (left, right):
        axes.set_ylabel("SLO attainment (%)")
        axes.set_ylim(0, 103)
        axes.legend(fontsize=8)
    left.set_title(", ".join(dict.fromkeys(run["workload"] for run in runs)))
    figure.tight_layout()
    figure.savefig(path)


def _neighbours(instances: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of consecutive instances."""
    out: list[tuple[int, int]] = []
    for instance in instances:
        if out and out[-1][1] == instance - 1:
            out[-1] = (out[-1][0], instance)
        else:
            out.append((instance, instance))
    return out


def _colour(bar: Bar) -> str:
    if bar.phase is Phase.PREFILL:
        return f"C{bar.what % 10}"
    return _GREYS[bar.what] if bar.phase is Phase.DECODE else _COLOURS[bar.phase]


def _matplotlib() -> tuple[Callable[..., Any], Any]:
    """(maker of figures, Rectangle). Without pyplot: no window, no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ConfigError("plot: pictures need matplotlib: pip install 'loong-jax[plots]'") from error

    def figure_of(**options: Any) -> Figure:
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        return figure

    return figure_of, Rectangle
