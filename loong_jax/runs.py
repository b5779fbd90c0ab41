"""Where the KV of each request lies: its pages, instance by instance (DESIGN 2, 5).

What it is: the table of the ledger, and of the mock executor that checks it. A page of a request holds one *run*
(consecutive positions); a request has at most one page for a position. Pages that follow each other without a gap are
one *extent*: all full, but maybe the last. Cost grows with extents, and with pages only where they are named.
What it is not: an allocator. Who may take, share or write a page is `ledger.py`'s business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
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


class Extent:
    """Positions `[first, end)` in `pages`, each full but maybe the last."""

    __slots__ = ("end", "first", "pages")

    def __init__(self, first: int, end: int, pages: list[int]) -> None:
        self.first, self.end, self.pages = first, end, pages


class Home:
    """A request on one instance: its extents, ascending."""

    __slots__ = ("extents", "num_pages")

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.num_pages = 0


Dropped = list[tuple[int, list[int]]]
"""Pages by instance."""


class RunTable:
    """Pages of requests by instance; a page holds `page_tokens` positions."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._requests: dict[int, dict[int, Home]] = {}

    # ---- questions

    def requests(self) -> list[int]:
        """Requests with at least one page, ascending."""
        return sorted(self._requests)

    def instances(self, request: int) -> list[int]:
        """Instances that hold a page of `request`, ascending."""
        return sorted(self._requests.get(request, ()))

    def home(self, request: int, instance: int) -> Home | None:
        """The live record: read it, do not keep or change it."""
        homes = self._requests.get(request)
        return homes.get(instance) if homes else None

    def num_pages(self, request: int, instance: int) -> int:
        home = self.home(request, instance)
        return home.num_pages if home is not None else 0

    def pages(self, request: int, instance: int) -> list[PageRun]:
        """Pages of `request` on `instance` by first position."""
        home = self.home(request, instance)
        return [entry for extent in home.extents for entry in self._entries(extent)] if home is not None else []

    def tokens(self, request: int) -> dict[int, int]:
        """Positions of `request` by instance, ascending."""
        homes = self._requests.get(request, {})
        return {i: sum([extent.end - extent.first for extent in homes[i].extents]) for i in sorted(homes)}

    def some(self, request: int, instance: int, skip: int, num: int) -> Iterator[tuple[int, Run]]:
        """The next `num` pages and their runs, after the `skip` lowest."""
        home, page_tokens = self.home(request, instance), self.page_tokens
        for extent in home.extents if home is not None else ():
            if skip >= len(extent.pages):
                skip -= len(extent.pages)
                continue
            first = extent.first + skip * page_tokens
            for page in extent.pages[skip : skip + num]:
                yield page, Run(first, min(page_tokens, extent.end - first))
                first += page_tokens
            num -= min(num, len(extent.pages) - skip)
            skip = 0
            if not num:
                return

    def missing(self, request: int, end: int, first: int = 0) -> list[Run]:
        """Runs of `[first, end)` without KV, ascending; no page straddles `first`."""
        homes = self._requests.get(request, {}).values()
        held = sorted((extent.first, extent.end) for home in homes for extent in home.extents)
        gaps: list[Run] = []
        position = first
        for start, stop in held:
            if start >= end:
                break
            if start > position:
                gaps.append(Run(position, start - position))
            position = max(position, stop)
        if position < end:
            gaps.append(Run(position, end - position))
        return gaps

    def _entries(self, extent: Extent) -> Iterator[PageRun]:
        page_tokens = self.page_tokens
        for first, page in zip(range(extent.first, extent.end, page_tokens), extent.pages, strict=True):
            yield PageRun(first, page, min(page_tokens, extent.end - first))

    # ---- changes

    def put(self, request: int, instance: int, page: int, run: Run) -> None:
        """Add a page, or give the new run of an open page that grew (same page, same first position)."""
        home = self.home(request, instance)
        at = bisect_right(home.extents, run.first, key=_first) if home is not None else 0
        extent = home.extents[at - 1] if home is not None and at else None
        if extent is None or run.first >= extent.end:
            self.add(request, instance, (page,), run)
            return
        index, offset = divmod(run.first - extent.first, self.page_tokens)
        assert offset == 0, f"a page of request {request} straddles {run.first}"
        assert extent.pages[index] == page, f"position {run.first} of request {request} already has a page"
        assert index == len(extent.pages) - 1, f"only an open page grows: {run.first} of request {request}"
        extent.end = run.end

    def add(self, request: int, instance: int, pages: Sequence[int], run: Run) -> None:
        """`run` lies in `pages`, as many as it takes."""
        home = self._requests.setdefault(request, {}).setdefault(instance, Home())
        extents = home.extents
        home.num_pages += len(pages)
        at = len(extents)
        if extents and extents[-1].first > run.first:
            at = bisect_right(extents, run.first, key=_first)
        before = extents[at - 1] if at else None
        if before is not None and before.end == run.first == before.first + len(before.pages) * self.page_tokens:
            before.pages += pages
            before.end = run.end
        else:
            extents.insert(at, Extent(run.first, run.end, list(pages)))

    def move(self, moves: Sequence[PageMove]) -> None:
        """The pages, all of one request and ascending, leave one `src` for one `dst`."""
        request, src, dst = moves[0].request, moves[0].src, moves[0].dst
        at = 0
        while at < len(moves):
            num = self._cut(request, src, moves, at)
            part = moves[at : at + num]
            first = part[0].run.first
            self.add(request, dst, [move.dst_page for move in part], Run(first, part[-1].run.end - first))
            at += num

    def _cut(self, request: int, instance: int, moves: Sequence[PageMove], at: int) -> int:
        """Take the page of `moves[at]`, and those behind it that follow in the same extent; returns how many."""
        home, first = self._requests[request][instance], moves[at].run.first
        index = bisect_right(home.extents, first, key=_first) - 1
        extent = home.extents[index]
        skip = (first - extent.first) // self.page_tokens
        held = extent.pages[skip : skip + len(moves) - at]
        num = len(held)
        if held != [move.src_page for move in moves[at : at + num]]:
            num = 1
        assert held[0] == moves[at].src_page, (held[0], moves[at])
        end = min(extent.end, first + num * self.page_tokens)
        parts: list[Extent] = []
        if skip:
            parts.append(Extent(extent.first, first, extent.pages[:skip]))
        if end < extent.end:
            parts.append(Extent(end, extent.end, extent.pages[skip + num :]))
        home.extents[index : index + 1] = parts
        home.num_pages -= num
        if not home.extents:
            del self._requests[request][instance]
        return num

    def share(self, parent: int, child: int, shared: Iterable[tuple[int, int, Run]]) -> None:
        """`child` gets these pages (instance, page, run) of `parent` too; its runs may be shorter than the parent's."""
        assert child != parent, parent
        for instance, page, run in shared:
            self.put(child, instance, page, run)

    def truncate(self, request: int, kv_len: int) -> Dropped:
        """Drop positions from `kv_len` on: returns the pages dropped, and shortens a run that straddles."""
        dropped: Dropped = []
        for instance in self.instances(request):
            home = self._requests[request][instance]
            keep = bisect_right(home.extents, kv_len - 1, key=_first)
            gone = [page for extent in home.extents[keep:] for page in extent.pages]
            del home.extents[keep:]
            if keep and home.extents[-1].end > kv_len:
                last = home.extents[-1]
                num = -(-(kv_len - last.first) // self.page_tokens)
                gone = last.pages[num:] + gone
                del last.pages[num:]
                last.end = kv_len
            self._forget(request, instance, gone, dropped)
        return dropped

    def slide(self, request: int, start: int) -> tuple[Dropped, int]:
        """Drop pages that end at or before `start`: the pages, and the largest end among them (0: none was dropped)."""
        dropped: Dropped = []
        end = 0
        for instance in self.instances(request):
            extents = self._requests[request][instance].extents
            gone: list[int] = []
            while extents and extents[0].end <= start:
                extent = extents.pop(0)
                gone += extent.pages
                end = max(end, extent.end)
            if extents and extents[0].first + self.page_tokens <= start:
                extent = extents[0]
                num = (start - extent.first) // self.page_tokens
                gone += extent.pages[:num]
                del extent.pages[:num]
                extent.first += num * self.page_tokens
                end = max(end, extent.first)
            self._forget(request, instance, gone, dropped)
        return dropped, end

    def _forget(self, request: int, instance: int, gone: list[int], dropped: Dropped) -> None:
        """`gone` left the extents of a home."""
        homes = self._requests[request]
        if gone:
            dropped.append((instance, gone))
            homes[instance].num_pages -= len(gone)
        if not homes[instance].extents:
            del homes[instance]
        if not homes:
            del self._requests[request]

    def drop(self, request: int, instances: Iterable[int]) -> Dropped:
        """Drop all pages of `request` on `instances`; returns them."""
        homes = self._requests.get(request)
        if homes is None:
            return []
        dropped: Dropped = []
        for instance in instances:
            home = homes.pop(instance, None)
            if home is not None:
                dropped.append((instance, [page for extent in home.extents for page in extent.pages]))
        if not homes:
            del self._requests[request]
        return dropped


def _first(extent: Extent) -> int:
    return extent.first
