"""The page of `scripts/compare_policies.py`: tables and a picture of what was simulated.

What it is not: a run of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_policies import ELASTIC, PAPER, SETUP, WORKLOADS, ZIPF

from loong_jax.sim.metrics import P90, p90_goodput

Line = dict[str, Any]

TOLERANCE = 0.005
"""Of attainment: what is so near to the best is bold, too."""

_COLOURS = ("#1b6ca8", "#c1440e", "#d98a00", "#6a8d2f", "#7b4ba0", "#8a6d5a", "#999999", "#444444")


def write_page(ablation: Sequence[Line], grid: Sequence[Line], out: Path) -> None:
    text = [_HEAD.format(instances=SETUP.instances, tp=SETUP.tp), _ablation(ablation)]
    if grid:
        text += [_grid(grid)]
        _draw(grid, out / "comparison.png")
    (out / "comparison.md").write_text("\n".join(text))


_HEAD = """# The policies against each other

Simulated: the manager and the policies that run live, on {instances} instances of {tp} A800 each with LWM-Text-1M (7B),
as in LoongServe's evaluation; KV pools as published; a policy written `@1x8` or `@2x4` runs on as many instances of so
many devices, `/1024` with chunks of so many tokens. Step times are the cost model's, calibrated on the published
measurements (`docs/cost_model.md`), for all systems alike: eager launches and transfers that wait for compute are in
them. The simulator knows no time on the host. A request meets the SLO of figure 12: TTFT within 25 times that of the
prompt alone, or 15 s, and 50 ms a token. Made by `scripts/compare_policies.py`.
"""


def goodput(lines: Sequence[Line], policy: str, workload: str) -> float | None:
    points = [(x["rate"], x["attainment"]) for x in lines if x["policy"] == policy and x["workload"] == workload]
    return p90_goodput([(0.0, 1.0), *points]) if points else None


def _ablation(lines: Sequence[Line]) -> str:
    policies = list(dict.fromkeys(x["policy"] for x in lines))
    rows = [
        "## Without elasticity (figure 12)",
        "",
        "Requests per second at which 90% of the requests meet the SLO; in brackets: measured by the paper.",
        "",
        "| policy | " + " | ".join(ZIPF) + " |",
        "| --- |" + " ---: |" * len(ZIPF),
    ]
    for policy in policies:
        cells: list[str] = []
        for index, workload in enumerate(ZIPF):
            value = goodput(lines, policy, workload)
            paper = f" ({PAPER[policy][index]:.3f})" if policy in PAPER else ""
            cells.append("" if value is None else f"{value:.2f}{paper}")
        rows.append(f"| {policy} | {' | '.join(cells)} |")
    note = (
        "Lengths are drawn by the published statistics. Time on the host, of which LoongServe spends most (a remote\n"
        "call with Python lists for each step), is not simulated."
    )
    return "\n".join([*rows, "", note, ""])


def family(policy: str) -> str:
    """Without the size of its chunk, which each baseline may choose anew for every workload and load."""
    return policy.split("/")[0]


def best_by_family(grid: Sequence[Line]) -> dict[tuple[str, float], dict[str, Line]]:
    """By workload and load: of each system its best run."""
    best: dict[tuple[str, float], dict[str, Line]] = {}
    for line in grid:
        of = best.setdefault((line["workload"], line["load"]), {})
        name = family(line["policy"])
        if name not in of or line["attainment"] > of[name]["attainment"]:
            of[name] = line
    return best


def _grid(grid: Sequence[Line]) -> str:
    names = [case.text for case in WORKLOADS]
    best = dict(sorted(best_by_family(grid).items(), key=lambda cell: (names.index(cell[0][0]), cell[0][1])))
    systems = sorted({family(line["policy"]) for line in grid}, key=lambda name: (name != ELASTIC, name))
    rows = [
        "## Twelve workloads, five loads",
        "",
        "Share of the requests that meet the SLO, in percent. Loads are shares of the fluid bound of the requests. A",
        "baseline with chunks takes the best size that was run. Bold: the best. What is empty was not run.",
        "",
        "| workload | load | req/s | " + " | ".join(systems) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(systems),
    ]
    for (workload, load), of in best.items():
        most = max(line["attainment"] for line in of.values())
        cells = []
        for system in systems:
            if system not in of:
                cells.append("")
                continue
            value = of[system]["attainment"]
            text = f"{100 * value:.1f}"
            cells.append(f"**{text}**" if value >= most - TOLERANCE else text)
        rate = next(iter(of.values()))["rate"]
        rows.append(f"| {workload} | {load:.2f} | {rate:.2f} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", _verdict(best), "", "![SLO attainment by load](comparison.png)", ""])


def _verdict(best: dict[tuple[str, float], dict[str, Line]]) -> str:
    below: list[str] = []
    compared = 0
    for (workload, load), of in best.items():
        if ELASTIC not in of or len(of) == 1:
            continue
        compared += 1
        other = max((line for name, line in of.items() if name != ELASTIC), key=lambda line: line["attainment"])
        behind = other["attainment"] - of[ELASTIC]["attainment"]
        if behind > 0:
            below.append(f"* {workload} at {load:.2f}: {100 * behind:.1f} points below {other['policy']}")
    if not compared:
        return "The elastic policy is not among the runs yet."
    above = f"{compared - len(below)} of {compared} cells that were compared"
    head = f"Elastic is at or above the best of the others in {above}"
    return "\n".join([f"{head}; elsewhere:", "", *below]) if below else f"{head}."


def _draw(grid: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    best = best_by_family(grid)
    systems = list(dict.fromkeys(family(line["policy"]) for line in grid))
    names = [case.text for case in WORKLOADS if any(line["workload"] == case.text for line in grid)]
    figure = Figure(figsize=(11, 2.1 * -(-len(names) // 4) + 0.6), dpi=100)
    for index, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 4), 4, index + 1)
        for number, system in enumerate(systems):
            points = sorted(
                (load, of[system]["attainment"]) for (w, load), of in best.items() if w == name and system in of
            )
            width, order = (2.4, 3) if system == ELASTIC else (1.1, 2)
            axes.plot(*zip(*points, strict=True), color=_COLOURS[number % len(_COLOURS)], linewidth=width, marker=".",
                      label=system, zorder=order)  # fmt: skip
        axes.axhline(P90, color="#bbbbbb", linewidth=0.7)
        axes.set_ylim(0, 1.03)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=7, frameon=False)
    figure.supxlabel("load, as a share of the fluid bound", fontsize=8, y=0.045)
    figure.supylabel("share of requests that meet the SLO", fontsize=8)
    figure.tight_layout(rect=(0.01, 0.06, 1, 1))
    figure.savefig(path)
