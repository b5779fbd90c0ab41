"""The run table against a table of single positions, which is slow and plainly right."""

from __future__ import annotations

import random

import pytest

from loong_jax.runs import Dropped, PageRun, RunTable
from loong_jax.types import PageMove, Run


class Positions:
    """(request, position) -> (instance, page, slot)."""

    def __init__(self) -> None:
        self.homes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def put(self, request: int, instance: int, page: int, run: Run) -> None:
        for slot in range(run.count):
            self.homes[request, run.first + slot] = (instance, page, slot)

    def drop(self, request: int, keep) -> set[tuple[int, int]]:
        gone = {k: v for k, v in self.homes.items() if k[0] == request and not keep(k[1], v[0])}
        for key in gone:
            del self.homes[key]
        left = {v[:2] for k, v in self.homes.items() if k[0] == request}
        return {v[:2] for v in gone.values()} - left

    def table(self, request: int, instance: int) -> list[PageRun]:
        pages: dict[int, list[int]] = {}
        for (owner, position), (home, page, _) in self.homes.items():
            if owner == request and home == instance:
                pages.setdefault(page, []).append(position)
        return sorted(PageRun(min(p), page, len(p)) for page, p in pages.items())


def pairs(dropped: Dropped) -> set[tuple[int, int]]:
    return {(instance, page) for instance, pages in dropped for page in pages}


@pytest.mark.parametrize("seed", range(20))
def test_against_positions(seed: int) -> None:
    rng = random.Random(seed)
    table, model, next_page = RunTable(4), Positions(), 0
    for _ in range(200):
        request, instance = rng.randrange(3), rng.randrange(3)
        action = rng.choice(("put", "put", "put", "grow", "move", "share", "truncate", "slide", "drop"))
        if action == "put":
            run = Run(rng.randrange(60), rng.randint(1, 11))
            if not any((request, p) in model.homes for p in range(run.first, run.end)):
                pages = list(range(next_page, next_page + -(-run.count // 4)))
                table.add(request, instance, pages, run)
                for page, first in zip(pages, range(run.first, run.end, 4), strict=True):
                    model.put(request, instance, page, Run(first, min(4, run.end - first)))
                next_page += len(pages)
        elif action == "grow":
            pages = table.pages(request, instance)
            if pages and pages[-1].count < 4 and (request, pages[-1].end) not in model.homes:
                run = Run(pages[-1].first, pages[-1].count + 1)
                page = pages[-1].page
                table.put(request, instance, page, run)
                model.put(request, instance, page, run)
        elif action == "move" and table.pages(request, instance):
            entries = table.pages(request, instance)
            first = rng.randrange(len(entries))
            dst = rng.choice([i for i in range(3) if i != instance])
            moves = []
            for entry in entries[first : first + rng.randint(1, 3)]:
                run = Run(entry.first, entry.count)
                moves.append(PageMove(request, instance, entry.page, dst, next_page, run))
                model.put(request, dst, next_page, run)
                next_page += 1
            table.move(moves)
        elif action == "share":
            child = 3 + rng.randrange(3)
            if not table.instances(child):
                shared = [(i, e.page, Run(e.first, e.count)) for i in range(3) for e in table.pages(request, i)]
                table.share(request, child, shared)
                for home, page, run in shared:
                    model.put(child, home, page, run)
        elif action == "truncate":
            request, kv_len = rng.randrange(6), rng.randrange(70)
            assert pairs(table.truncate(request, kv_len)) == model.drop(request, lambda p, _, n=kv_len: p < n)
        elif action == "slide":
            request, start = rng.randrange(6), rng.randrange(30)
            ends = {(i, e.page): e.end for i in range(3) for e in table.pages(request, i) if e.end <= start}
            dropped, end = table.slide(request, start)
            assert (pairs(dropped), end) == (set(ends), max(ends.values(), default=0))
            kept = {p for (r, p), home in model.homes.items() if r == request and home[:2] not in ends}
            model.drop(request, lambda p, _, kept=kept: p in kept)
        elif action == "drop":
            request = rng.randrange(6)
            dropped = model.drop(request, lambda _, i, j=instance: i not in (j, 2))
            assert pairs(table.drop(request, [instance, 2])) == dropped
        for request in range(6):
            for instance in range(3):
                assert table.pages(request, instance) == model.table(request, instance)
                assert table.num_pages(request, instance) == len(table.pages(request, instance))
                some = [(e.page, Run(e.first, e.count)) for e in table.pages(request, instance)]
                assert list(table.some(request, instance, 2, 3)) == some[2:5]
            homes = {v[0] for k, v in model.homes.items() if k[0] == request}
            assert table.instances(request) == list(table.tokens(request)) == sorted(homes)
            missing = [p for run in table.missing(request, 65) for p in range(run.first, run.end)]
            assert missing == [p for p in range(65) if (request, p) not in model.homes]
            starts = [e.first for i in range(3) for e in table.pages(request, i)]
            if starts:
                missing = [p for run in table.missing(request, 65, min(starts)) for p in range(run.first, run.end)]
                assert missing == [p for p in range(min(starts), 65) if (request, p) not in model.homes]


def test_a_position_has_one_page() -> None:
    table = RunTable(4)
    table.put(1, 0, 5, Run(0, 4))
    with pytest.raises(AssertionError, match="already has a page"):
        table.put(1, 0, 6, Run(0, 4))


def test_cost_grows_with_pages_not_tokens() -> None:
    """A truncate of a million tokens touches only the pages it drops."""
    table = RunTable(16384)
    for page in range(64):
        table.put(1, 0, page, Run(page * 16384, 16384))
    assert table.truncate(1, 40 * 16384 + 5) == [(0, list(range(41, 64)))]
    assert table.pages(1, 0)[-1] == PageRun(40 * 16384, 40, 5)
