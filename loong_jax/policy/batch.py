"""Batching: which requests share a step, and on how many instances each batch runs (LoongServe section 5.3, Eq 5).

The exact dynamic programme over contiguous partitions: requests in a given order (by length) are cut into batches,
instances in a given order (by use) into groups, batch after batch on group after group; an instance may be left out.
It minimises the sum over requests of predicted latency times weight (1 / length: normalised latency), subject to free
pages, to what each READY program takes, and to nothing else. The released code prunes it wrongly and always finds one
batch; here a state is only passed over when another provably does as well.

What it is not: a choice of who takes part (`dispatch.py`), of the order, or of where KV is kept (`placement.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar, cast

INFINITE = float("inf")

Amount = TypeVar("Amount", int, float)


class Work(NamedTuple):
    """What one request adds to a step: new tokens, (query, key) pairs, resident context, and what a second of the step
    costs it. With chunks these depend on the DoP."""

    tokens: int
    pairs: float
    context: int
    weight: float


class Batch(NamedTuple):
    """Requests `[first, last)` on instances `[at, at + dop)`, both of the given orders, for predicted `seconds`."""

    first: int
    last: int
    at: int
    dop: int
    seconds: float


class Shape(NamedTuple):
    """A group with a READY program: how many tokens its step may take, and what it costs to end up there, for each
    request."""

    tokens: int
    landing: float = 0.0


class Slots(NamedTuple):
    """Instances in order: `free` pages of each; `stall`: what a second costs those who must wait for it meanwhile;
    `shapes`: groups by (position of the first, DoP)."""

    free: Sequence[int]
    stall: Sequence[float]
    shapes: Mapping[tuple[int, int], Shape]


StepSeconds = Callable[[int, int, float, int], float]
"""Predicted seconds by (dop, tokens, pairs, context)."""


class Batching:
    """`costs[n]`: the best objective for the first n requests (INFINITE where they do not fit)."""

    def __init__(
        self,
        work: Mapping[int, Sequence[Work]],
        pages: Sequence[int],
        slots: Slots,
        step_s: StepSeconds,
        price: float = 0.0,
    ) -> None:
        """`work`: by DoP, of each request in order; `pages`: free ones that each needs. `price`: what a second of one
        instance costs those who are not among the requests."""
        self._num = len(pages)
        self._sums = {dop: _sums(works) for dop, works in work.items()}
        self._pages = _running(pages)
        self._slots = slots
        self._step_s = step_s
        self._price = price
        self._times: dict[tuple[int, int, int], float] = {}
        self._best = [[INFINITE] * (self._num + 1) for _ in range(len(slots.free) + 1)]
        self._from: list[dict[int, Batch]] = [{} for _ in range(len(slots.free) + 1)]
        self._solve()
        self.costs: Sequence[float] = self._best[-1]

    def batches(self, num_requests: int) -> list[Batch]:
        """The best batches for the first so many requests, the last ones first; [] when they do not fit."""
        out: list[Batch] = []
        at, request = len(self._slots.free), num_requests
        if self._best[at][request] == INFINITE:
            return out
        while request:
            batch = self._from[at].get(request)
            if batch is None:
                at -= 1
            else:
                out.append(batch)
                at, request = batch.at, batch.first
        return out

    def _solve(self) -> None:
        num_slots = len(self._slots.free)
        free, stall = _running(self._slots.free), _running(self._slots.stall)
        dops = sorted(self._sums)
        best = self._best
        best[0][0] = 0.0
        for at in range(num_slots):
            for dop in dops:
                shape = self._slots.shapes.get((at, dop))
                if shape is not None:
                    end = at + dop
                    self._extend(at, dop, shape, free[end] - free[at], stall[end] - stall[at])
            here, there, arrived = best[at], best[at + 1], self._from[at + 1]
            for request, cost in enumerate(here):
                if cost <= there[request]:
                    there[request] = cost
                    arrived.pop(request, None)

    def _alike(self, at: int, dop: int) -> bool:
        """Whether the group one place before is as good: nothing is gained by leaving an instance out for this one."""
        free, stall, shapes = self._slots.free, self._slots.stall, self._slots.shapes
        before, here = shapes.get((at - 1, dop)), shapes[at, dop]
        if before is None or before.tokens < here.tokens or before.landing > here.landing:
            return False
        return free[at - 1] >= free[at + dop - 1] and stall[at - 1] <= stall[at + dop - 1]

    def _extend(self, at: int, dop: int, shape: Shape, free: float, stall: float) -> None:
        """From every state before `at`: a batch more, on `dop` instances from there."""
        tokens, pairs, context, weight = self._sums[dop]
        here, before = self._best[at], self._best[at - 1] if at else None
        there, arrived = self._best[at + dop], self._from[at + dop]
        pages, times, step_s = self._pages, self._times, self._step_s
        fixed = self._price * dop + stall
        cap, landing = shape
        same = self._alike(at, dop)
        for first in range(self._num):
            cost = here[first]
            if cost == INFINITE or (same and before is not None and before[first] == cost):
                continue
            base_tokens, base_pages, base_weight = tokens[first], pages[first], weight[first]
            for last in range(first + 1, self._num + 1):
                if tokens[last] - base_tokens > cap or pages[last] - base_pages > free:
                    break
                seconds = times.get((dop, first, last))
                if seconds is None:
                    seconds = times[dop, first, last] = step_s(
                        dop, tokens[last] - base_tokens, pairs[last] - pairs[first], context[last] - context[first]
                    )
                total = cost + seconds * (weight[last] - base_weight + fixed) + landing * (last - first)
                if total < there[last]:
                    there[last] = total
                    arrived[last] = Batch(first, last, at, dop, seconds)


def _sums(works: Sequence[Work]) -> tuple[list[int], list[float], list[int], list[float]]:
    return (
        _running([work.tokens for work in works]),
        _running([work.pairs for work in works]),
        _running([work.context for work in works]),
        _running([work.weight for work in works]),
    )


def _running(values: Iterable[Amount]) -> list[Amount]:
    """Sums of the first n values, for each n."""
    return list(accumulate(values, initial=cast(Amount, 0)))
