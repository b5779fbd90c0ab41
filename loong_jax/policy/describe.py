"""A decision as text: instances as columns, what each runs and is given, what is held, and why.

What it is: a picture for people, of a view and a plan together; the golden scenarios are made of it.
What it is not: the manager's state (`Manager.describe`), or a trace over time (`loong_jax/sim/trace.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from loong_jax.types import Plan, PlannedDecode, PlannedPrefill, RequestView, Run, View

WIDTH = 9


def describe(view: View, plan: Plan) -> str:
    """The columns, then a line for each part of the plan."""
    requests = {request.request: request for request in (*view.active, *view.waiting)}
    drawn: list[tuple[Sequence[int], str]] = []
    lines: list[str] = []
    for evict in plan.evicts:
        lines.append(f"evict r{evict.request}: an older one lacks a page")
    for migrate in plan.migrates:
        move = migrate.rehome
        drawn.append(((move.src, move.dst), "M"))
        lines.append(f"M {move.src}>{move.dst}: {move.pages} pages of r{move.request}, so that fewer instances decode")
    for prefill in plan.prefills:
        drawn.append((prefill.instances, "P"))
        lines.append(_prefill(prefill, requests))
    for decode in plan.decodes:
        drawn.append((decode.instances, "D"))
        lines.append(_decode(decode, requests))
    for hold in plan.reservations:
        drawn.append((hold.instances, "hold"))
        lines.append(f"hold {_names(hold.instances)} for r{hold.request}: it needs them together")
    for prepare in plan.prepares:
        phase = prepare.program.phase
        lines.append(f"prepare {phase} x{prepare.program.dop} on {_names(prepare.instances)}: not READY")
    return "\n".join([*_columns(view, drawn), *lines])


def _columns(view: View, drawn: Iterable[tuple[Sequence[int], str]]) -> list[str]:
    """Pages in use, steps under way, and what comes behind them; a group's instances are joined by its letter."""
    given: dict[int, list[str]] = {i.instance: [] for i in view.instances}
    for number, (instances, letter) in enumerate(drawn):
        name = letter if letter == "hold" else f"{letter}{number or ''}x{len(instances)}"
        for instance in instances:
            given[instance].append(name)
    rows = [
        ["", *(str(i.instance) if i.alive else f"({i.instance})" for i in view.instances)],
        ["pages", *(f"{i.num_pages - i.free_pages}/{i.num_pages}" for i in view.instances)],
        ["runs", *(_running(i.queued, i.prefilling) for i in view.instances)],
        ["given", *("+".join(given[i.instance]) or "." for i in view.instances)],
    ]
    return ["".join(f"{cell:>{WIDTH}}" if k else f"{cell:<6}" for k, cell in enumerate(row)).rstrip() for row in rows]


def _running(queued: int, prefilling: int) -> str:
    return "P" * prefilling + "d" * (queued - prefilling) or "-"


def _prefill(prefill: PlannedPrefill, requests: dict[int, RequestView]) -> str:
    rows = [_prefill_row(row.runs, requests[row.request]) for row in prefill.rows]
    kept: Counter[int] = Counter()
    for share in prefill.keep:
        kept[share.instance] += share.pages
    homes = ", ".join(f"{pages} on {instance}" for instance, pages in sorted(kept.items()))
    moves = "".join(f"; {m.pages} of r{m.request} move {m.src}>{m.dst} on the way" for m in prefill.rehome)
    has_context = any(requests[row.request].resident for row in prefill.rows)
    form = f", {prefill.form}" if has_context else ""
    return f"P x{len(prefill.instances)} on {_names(prefill.instances)}{form}: {', '.join(rows)}; keeps {homes}{moves}"


def _prefill_row(runs: Sequence[Run], request: RequestView) -> str:
    now, missing = sum(run.count for run in runs), sum(run.count for run in request.missing)
    return f"r{request.request} all {now}" if now == missing else f"r{request.request} {now} of {missing}"


def _decode(decode: PlannedDecode, requests: dict[int, RequestView]) -> str:
    masters = Counter(row.master for row in decode.rows)
    rows = ", ".join(f"r{row.request}" for row in decode.rows[:8]) + (", ..." if len(decode.rows) > 8 else "")
    shares = ", ".join(f"{count} by {master}" for master, count in sorted(masters.items()))
    return f"D x{len(decode.instances)} on {_names(decode.instances)}: {rows}; {shares}"


def _names(instances: Iterable[int]) -> str:
    return ",".join(map(str, instances))
