"""Sends the requests of a benchmark when their time has come, and keeps when each token came back.

What it is not: a way to a server (`serving/bench/backends.py`), or statistics (`serving/bench/result.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import msgspec

from serving.bench.backends import Backend, BackendError, Ended, Got
from serving.bench.prompts import Item

CUT_OFF = "cut off by the person who ran it"


class Outcome(msgspec.Struct):
    """What became of one request. Times are in seconds: `start_s` since the run began, the others since `start_s`.
    `waited_s`: for a free place among the most at once, before it was sent. `pieces`: when tokens came, how many."""

    start_s: float = 0.0
    waited_s: float = 0.0
    latency_s: float = 0.0
    pieces: list[tuple[float, int]] = msgspec.field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    text: str = ""
    finish_reason: str = ""
    dops: Mapping[tuple[str, int], int] = msgspec.field(default_factory=dict)
    error: str = ""

    @property
    def success(self) -> bool:
        return bool(self.finish_reason) and not self.error

    @property
    def ttft_s(self) -> float:
        """0 where no token came."""
        return self.pieces[0][0] if self.pieces else 0.0

    @property
    def itls_s(self) -> list[float]:
        times = [time_s for time_s, _ in self.pieces]
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Time per token after the first; 0 where there is one."""
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


class Run(msgspec.Struct):
    """A run under way, or over. `outcomes` are in the order of the items; one that was not sent yet has none."""

    items: Sequence[Item]
    outcomes: dict[int, Outcome] = msgspec.field(default_factory=dict)
    done: list[int] = msgspec.field(default_factory=list)
    num_tokens: int = 0
    num_open: int = 0
    duration_s: float = 0.0
    cut_off: bool = False


async def run_all(
    run: Run, backend: Backend, arrivals_s: Sequence[float], max_concurrency: int | None, now_s: float | None = None
) -> None:
    """Return when all have ended. When cancelled, what is open is cut off, and the run is told so."""
    start_s = time.perf_counter() if now_s is None else now_s
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    tasks: list[asyncio.Task[None]] = []
    try:
        for index, arrival_s in enumerate(arrivals_s):
            wait_s = arrival_s - (time.perf_counter() - start_s)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(_one(run, index, backend, places, start_s)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        run.cut_off = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    run.duration_s = time.perf_counter() - start_s


async def _one(run: Run, index: int, backend: Backend, places: asyncio.Semaphore | None, run_start_s: float) -> None:
    wanted_s = time.perf_counter()
    async with AsyncExitStack() as stack:
        if places is not None:
            await stack.enter_async_context(places)
        outcome = run.outcomes[index] = Outcome()
        run.num_open += 1
        sent_s = time.perf_counter()
        outcome.start_s, outcome.waited_s = sent_s - run_start_s, sent_s - wanted_s
        try:
            await _read(run, run.items[index], backend, outcome, sent_s)
        except BackendError as error:
            outcome.error = str(error) or "failed"
        except asyncio.CancelledError:
            outcome.error = CUT_OFF
            raise
        finally:
            outcome.latency_s = outcome.latency_s or time.perf_counter() - sent_s
            run.num_open -= 1
            run.done.append(index)


async def _read(run: Run, item: Item, backend: Backend, outcome: Outcome, sent_s: float) -> None:
    texts = []
    async for event in backend.stream(item):
        came_s = time.perf_counter() - sent_s
        if isinstance(event, Got):
            outcome.pieces.append((came_s, event.num_tokens))
            texts.append(event.text)
            run.num_tokens += event.num_tokens
            outcome.latency_s = came_s
        elif isinstance(event, Ended):
            outcome.finish_reason, outcome.dops = event.finish_reason, event.dops
            _count(run, outcome, event.num_tokens)
            given = item.num_prompt_tokens
            outcome.num_prompt_tokens = given if event.num_prompt_tokens is None else event.num_prompt_tokens
    outcome.text = "".join(texts)


def _count(run: Run, outcome: Outcome, told: int | None) -> None:
    """An event over HTTP may hold several tokens; those that the server counted beside came with the last one."""
    counted = sum(num for _, num in outcome.pieces)
    outcome.num_tokens = counted if told is None else told
    unseen = outcome.num_tokens - counted
    if unseen > 0 and outcome.pieces:
        time_s, num = outcome.pieces[-1]
        outcome.pieces[-1] = (time_s, num + unseen)
        run.num_tokens += unseen
