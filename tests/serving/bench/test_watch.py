"""The live figures, and what is shown without a terminal."""

import asyncio
import io

from rich.console import Console

from serving.bench import watch
from serving.bench.prompts import Item
from serving.bench.runner import Outcome, Run


def test_figures_of_the_last_seconds():
    run = Run([Item("a", 1, 1)] * 3, num_open=1)
    figures = watch.Figures(run)
    assert figures.now(0.0) == "1 open, 0 tok/s"
    run.num_tokens = 100
    assert "50 tok/s" in figures.now(2.0)
    run.outcomes[0] = Outcome(latency_s=1.25, pieces=[(0.25, 1), (1.25, 1)], num_tokens=2, finish_reason="stop")
    run.outcomes[1] = Outcome(error="gone")
    run.done = [0, 1]
    assert figures.now(6.0) == "1 open, 0 tok/s, TTFT 250 ms, TPOT 1,000.0 ms, 1 failed"


def test_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(watch, "_REFRESH_S", 0.01)
    monkeypatch.setattr(watch, "_LINE_S", 0.02)
    console = Console(file=io.StringIO(), width=100)

    async def play():
        watching = asyncio.ensure_future(watch.watch(Run([Item("a", 1, 1)]), console))
        await asyncio.sleep(0.3)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(play())
    assert "0 of 1 done, 0 open" in console.file.getvalue()
