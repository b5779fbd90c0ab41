"""What a benchmark shows while it runs: a bar with live figures on a terminal, a line now and then elsewhere.

What it is not: the result (`serving/bench/result.py`).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serving.bench.runner import Run

_REFRESH_S = 0.25
_LINE_S = 5.0
_RECENT_S = 5.0
_RECENT_REQUESTS = 100


class Figures:
    """Rates over the last seconds, medians over the last requests."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._counts: deque[tuple[float, int]] = deque()

    def now(self, now_s: float) -> str:
        run = self._run
        self._counts.append((now_s, run.num_tokens))
        while now_s - self._counts[0][0] > _RECENT_S:
            self._counts.popleft()
        then_s, then_tokens = self._counts[0]
        span_s = now_s - then_s
        rate = (run.num_tokens - then_tokens) / span_s if span_s else 0.0
        recent = [run.outcomes[index] for index in run.done[-_RECENT_REQUESTS:]]
        good = [outcome for outcome in recent if outcome.success]
        failed = sum(1 for outcome in run.outcomes.values() if outcome.error)
        words = [f"{run.num_open} open", f"{rate:,.0f} tok/s"]
        if good:
            words.append(f"TTFT {1e3 * statistics.median(o.ttft_s for o in good):,.0f} ms")
            words.append(f"TPOT {1e3 * statistics.median(o.tpot_s for o in good):,.1f} ms")
        if failed:
            words.append(f"{failed} failed")
        return ", ".join(words)


async def watch(run: Run, console: Console) -> None:
    """Show the run until cancelled."""
    figures = Figures(run)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(run.items))
        said_s = start_s = time.monotonic()
        while True:
            await asyncio.sleep(_REFRESH_S)
            now_s = time.monotonic()
            words = figures.now(now_s)
            progress.update(task, completed=len(run.done), description=words)
            if not console.is_terminal and now_s - said_s >= _LINE_S:
                said_s = now_s
                line = f"[{now_s - start_s:7.1f} s] {len(run.done)} of {len(run.items)} done, {words}"
                console.print(line, markup=False, highlight=False)
