"""Brute force for the batching: random small instances, and the best partition by trying all of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from loong_jax.policy.batch import INFINITE, Shape, Slots, Work


class Case:
    """A random instance: `num` requests by length, `free` pages of instances, costs of the usual shape."""

    def __init__(self, rng: random.Random, max_requests: int = 5, max_instances: int = 4, simple: bool = False) -> None:
        self.num = rng.randint(1, max_requests)
        self.m = rng.randint(1, max_instances)
        lengths = sorted(int(10 ** rng.uniform(0.5, 4)) for _ in range(self.num))
        self.dops = [dop for dop in (1, 2, 3, 4) if dop <= self.m and (simple or dop == 1 or rng.random() < 0.8)]
        self.work = {}
        for dop in self.dops:
            chunk = INFINITE if simple or rng.random() < 0.6 else rng.choice((500, 2000)) * dop
            self.work[dop] = [_work(rng, length, chunk, simple) for length in lengths]
        self.pages = [-(-length // 16) for length in lengths]
        room = 10**6 if simple else rng.choice((sum(self.pages) // 2, sum(self.pages), 10**6))
        self.free = [rng.choice((0, room // 2, room, room)) if not simple else room for _ in range(self.m)]
        self.stall = [rng.choice((0.0, 0.0, 0.01)) if not simple else 0.0 for _ in range(self.m)]
        self.shapes = {
            (at, dop): Shape(rng.choice((10**6, 10**6, 4000 * dop)), rng.choice((0.0, 0.001)))
            if not simple
            else Shape(10**6)
            for dop in self.dops
            for at in range(self.m - dop + 1)
            if simple or rng.random() < 0.85
        }
        self.price = rng.choice((0.0, 0.001)) if not simple else 0.0
        self.base_s, self.token_s, self.pair_s = rng.choice(((0.02, 3e-5, 1e-9), (0.001, 1e-4, 0.0), (0.1, 1e-6, 1e-9)))
        self._batches: dict[tuple[int, int, int, int], float] = {}

    @property
    def slots(self) -> Slots:
        return Slots(self.free, self.stall, self.shapes)

    def step_s(self, dop: int, tokens: int, pairs: float, context: int) -> float:
        return self.base_s * (1 + 0.05 * dop) + (self.token_s * tokens + self.pair_s * (pairs + context)) / dop

    def cost(self, requests: list[int], instances: list[int]) -> float:
        """Of one batch, whatever the order of instances; INFINITE when it does not fit."""
        dop = len(instances)
        if dop not in self.work or sum(self.pages[r] for r in requests) > sum(self.free[i] for i in instances):
            return INFINITE
        works = [self.work[dop][r] for r in requests]
        seconds = self.step_s(
            dop, sum(w.tokens for w in works), sum(w.pairs for w in works), sum(w.context for w in works)
        )
        weight = sum(w.weight for w in works) + self.price * dop + sum(self.stall[i] for i in instances)
        return seconds * weight

    def batch(self, first: int, last: int, at: int, dop: int) -> float:
        """Of requests `[first, last)` on instances `[at, at + dop)`, with what it costs them to be there; computed
        once, for brute force asks for each batch in many partitions."""
        key = first, last, at, dop
        if key not in self._batches:
            requests, shape = list(range(first, last)), self.shapes.get((at, dop))
            if shape is None or self.tokens(requests, dop) > shape.tokens:
                self._batches[key] = INFINITE
            else:
                self._batches[key] = self.cost(requests, list(range(at, at + dop))) + shape.landing * len(requests)
        return self._batches[key]

    def tokens(self, requests: list[int], dop: int) -> int:
        return sum(self.work[dop][r].tokens for r in requests)


def _work(rng: random.Random, length: int, chunk: float, simple: bool) -> Work:
    tokens = min(length, int(chunk) if chunk != INFINITE else length)
    context = 0 if simple else rng.choice((0, 0, 1000))
    return Work(tokens, tokens * (tokens / 2 + context), context, -(-length // tokens) / length)


def contiguous(case: Case, num: int, first: int = 0, at: int = 0) -> float:
    """The least cost of serving requests `[first, num)` with instances from `at` on, by trying everything."""
    if first == num:
        return 0.0
    best = INFINITE
    for start in range(at, case.m):
        for dop in case.dops:
            for last in range(first + 1, num + 1):
                cost = case.batch(first, last, start, dop)
                if cost < INFINITE:
                    best = min(best, cost + contiguous(case, num, last, start + dop))
    return best


def all_partitions(case: Case) -> float:
    """The least cost over all ways to share requests out, on groups of any instances."""
    best = INFINITE
    for blocks in _set_partitions(list(range(case.num))):
        best = min(best, _assign(case, blocks, list(range(case.m))))
    return best


def _assign(case: Case, blocks: list[list[int]], instances: list[int]) -> float:
    if not blocks:
        return 0.0
    best = INFINITE
    for mask in range(1, 1 << len(instances)):
        group = [i for k, i in enumerate(instances) if mask >> k & 1]
        cost = case.cost(blocks[0], group)
        if cost < INFINITE:
            rest = [i for i in instances if i not in group]
            best = min(best, cost + _assign(case, blocks[1:], rest))
    return best


def _set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    head, rest = items[0], items[1:]
    for partition in _set_partitions(rest):
        yield [[head], *partition]
        for k, block in enumerate(partition):
            yield [*partition[:k], [head, *block], *partition[k + 1 :]]
