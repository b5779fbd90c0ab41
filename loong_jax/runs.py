"""Where the KV of each request lies: its pages, instance by instance (DESIGN 2, 5).

What it is: the one table kept by the ledger and by the executor's mirror of it. A page of a request holds one *run*
(consecutive positions); a request has at most one page for a position. Cost grows with pages touched, not tokens.
What it is not: an allocator. Who may take, share or write a page is `ledger.py`'s business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loong_jax.types import PageMove, Run


class PageRun(NamedTuple):
    """One entry of a page table: slots `[0, count)` of `page` hold positions `[first, first + count)`."""

    first: int
    page: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def end(self) -> int:
        return self.first + self.count


# Sorts before every entry that starts at the same position.
def _at(first: int) -> tuple[int, int]:
    return (first, -1)


class RunTable:
    """Pages of requests by instance, each list sorted by first position."""

    def __init__(self) -> None:
        self._requests: dict[int, dict[int, list[PageRun]]] = {}

    def requests(self) -> list[int]:
        """Requests with at least one page, ascending."""
        return sorted(self._requests)

    def instances(self, request: int) -> list[int]:
        """Instances that hold a page of `request`, ascending."""
        return sorted(self._requests.get(request, ()))

    def pages(self, request: int, instance: int) -> list[PageRun]:
        """Pages of `request` on `instance` by first position. The live list: read it, do not keep or change it."""
        homes = self._requests.get(request)
        return homes.get(instance, []) if homes else []

    def put(self, request: int, instance: int, page: int, run: Run) -> None:
        """Add a page, or give the new run of an open page that grew (same page, same first position)."""
        homes = self._requests.setdefault(request, {})
        entries = homes.setdefault(instance, [])
        entry = PageRun(run.first, page, run.count)
        if not entries or entries[-1].first < run.first:
            entries.append(entry)
            return
        index = bisect_left(entries, _at(run.first))
        if index < len(entries) and entries[index].first == run.first:
            assert entries[index].page == page, f"position {run.first} of request {request} already has a page"
            entries[index] = entry
        else:
            entries.insert(index, entry)

    def add(self, request: int, instance: int, pages: Sequence[int], runs: Sequence[Run]) -> None:
        """As `put` of each page with its run; the runs are ascending."""
        entries = self._requests.setdefault(request, {}).setdefault(instance, [])
        if entries and entries[-1].first >= runs[0].first:
            for page, run in zip(pages, runs, strict=True):
                self.put(request, instance, page, run)
        else:
            entries += [PageRun(run.first, page, run.count) for page, run in zip(pages, runs, strict=True)]

    def move(self, moves: Sequence[PageMove]) -> None:
        """The pages, all of one request and ascending, leave one `src` for one `dst`."""
        first = moves[0]
        homes = self._requests[first.request]
        entries = homes[first.src]
        moved = [PageRun(move.run.first, move.src_page, move.run.count) for move in moves]
        index = bisect_left(entries, moved[0])
        if entries[index : index + len(moved)] == moved:  # mostly they lie one after the other
            del entries[index : index + len(moved)]
        else:
            for entry in moved:
                index = bisect_left(entries, entry)
                assert entries[index] == entry, (entries[index], entry)
                del entries[index]
        if not entries:
            del homes[first.src]
        target = homes.setdefault(first.dst, [])
        target += [PageRun(move.run.first, move.dst_page, move.run.count) for move in moves]
        target.sort()  # two ascending parts: linear

    def share(self, parent: int, child: int, shared: Iterable[tuple[int, int, Run]]) -> None:
        """`child` gets these pages (instance, page, run) of `parent` too; its runs may be shorter than the parent's."""
        assert child != parent, parent
        for instance, page, run in shared:
            self.put(child, instance, page, run)

    def truncate(self, request: int, kv_len: int) -> list[tuple[int, int]]:
        """Drop positions from `kv_len` on: returns the (instance, page) pairs dropped, and shortens a run that
        straddles."""
        homes = self._requests.get(request)
        if homes is None:
            return []
        dropped: list[tuple[int, int]] = []
        for instance in sorted(homes):
            entries = homes[instance]
            keep = bisect_left(entries, _at(kv_len))
            dropped += [(instance, entry.page) for entry in entries[keep:]]
            del entries[keep:]
            if entries and entries[-1].end > kv_len:
                last = entries[-1]
                entries[-1] = PageRun(last.first, last.page, kv_len - last.first)
            if not entries:
                del homes[instance]
        if not homes:
            del self._requests[request]
        return dropped

    def slide(self, request: int, start: int) -> tuple[list[tuple[int, int]], int]:
        """Drop pages that end at or before `start`: the (instance, page) pairs, and the largest end among them (0: none
        was dropped)."""
        homes = self._requests.get(request)
        if homes is None:
            return [], 0
        dropped: list[tuple[int, int]] = []
        end = 0
        for instance in sorted(homes):
            entries = homes[instance]
            keep = 0
            while keep < len(entries) and entries[keep].end <= start:
                keep += 1
            if keep == 0:
                continue
            dropped += [(instance, entry.page) for entry in entries[:keep]]
            end = max(end, entries[keep - 1].end)
            del entries[:keep]
            if not entries:
                del homes[instance]
        if not homes:
            del self._requests[request]
        return dropped, end

    def drop(self, request: int, instances: Iterable[int]) -> list[tuple[int, int]]:
        """Drop all pages of `request` on `instances`; returns the (instance, page) pairs dropped."""
        homes = self._requests.get(request)
        if homes is None:
            return []
        dropped: list[tuple[int, int]] = []
        for instance in instances:
            dropped += [(instance, entry.page) for entry in homes.pop(instance, ())]
        if not homes:
            del self._requests[request]
        return dropped

    def missing(self, request: int, end: int, first: int = 0) -> list[Run]:
        """Runs of `[first, end)` without KV, ascending; no page straddles `first`."""
        entries = sorted(entry for pages in self._requests.get(request, {}).values() for entry in pages)
        gaps: list[Run] = []
        position = first
        for entry in entries:
            if entry.first >= end:
                break
            if entry.first > position:
                gaps.append(Run(position, entry.first - position))
            position = entry.end
        if position < end:
            gaps.append(Run(position, end - position))
        return gaps
