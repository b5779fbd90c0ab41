"""The host's mirror of the page tables on the devices: which pages of a request an instance holds, entry by entry.

Commands tell what changes; the mirror keeps every instance's table as an array and the entries that changed since the
device last heard of them, so that a step carries a few deltas instead of a table. Entries of one request are
contiguous (a *region*), in no particular order: attention over a set of positions does not care. What it is not:
accounting of free pages or refcounts (`ledger.py`), or anything that knows JAX.
"""

from __future__ import annotations

import numpy as np

from loong_jax.buckets import units
from loong_jax.types import (
    AnyCommand,
    CopyPages,
    Fork,
    Free,
    Migrate,
    PageMove,
    Reset,
    Run,
    RunDecode,
    RunPrefill,
    Slide,
    Truncate,
)

_MIN_REGION = 8
NO_ENTRY = 2**31 - 1
"""Beyond every table: a delta for it is dropped on the device."""


class TableFull(RuntimeError):
    """More page-table entries on one instance than `ClusterConfig.table_entries`."""


class _Region:
    """Entries `[start, start + length)` of one request; `index` maps a page to its offset."""

    __slots__ = ("capacity", "index", "length", "start")

    def __init__(self):
        self.start = self.capacity = self.length = 0
        self.index: dict[int, int] = {}


class InstanceTable:
    """The page table of one instance. `entries` is `[num_entries, 3]` of (page, first position, count)."""

    def __init__(self, num_entries: int):
        self.entries = np.zeros((num_entries, 3), np.int32)
        self._regions: dict[int, _Region] = {}
        self._free: dict[int, list[int]] = {}  # capacity -> starts
        self._bump = 0
        self._pending: dict[int, None] = {}  # entries the device has not heard of, in order
        self.stale = False  # the whole table must be uploaded

    def range(self, request: int) -> tuple[int, int]:
        """First entry and number of entries of a request; (0, 0) when it has none here."""
        region = self._regions.get(request)
        return (region.start, region.length) if region is not None else (0, 0)

    def ranges(self, requests: list[int]) -> list[tuple[int, int, int]]:
        """(index in `requests`, first entry, number of entries) of those that have entries here."""
        regions = self._regions
        return [(i, regions[r].start, regions[r].length) for i, r in enumerate(requests) if r in regions]

    def entry(self, request: int, page: int) -> int:
        region = self._regions[request]
        return region.start + region.index[page]

    def put(self, request: int, page: int, run: Run) -> None:
        """A new page, or the new run of a page the request already has here."""
        region = self._regions.get(request)
        if region is None:
            region = self._regions[request] = _Region()
        offset = region.index.get(page)
        if offset is None:
            if region.length == region.capacity:
                self._grow(request, region)
            offset = region.index[page] = region.length
            region.length += 1
        self._write(region.start + offset, page, run.first, run.count)

    def remove(self, request: int, page: int) -> None:
        region = self._regions[request]
        offset = region.index.pop(page)
        region.length -= 1
        if offset != region.length:  # the last entry fills the hole
            last = self.entries[region.start + region.length]
            region.index[int(last[0])] = offset
            self._write(region.start + offset, *last)
        if region.length == 0:
            self.drop(request)

    def truncate(self, request: int, kv_len: int) -> None:
        region = self._regions.get(request)
        if region is None:
            return
        held = self.entries[region.start : region.start + region.length].copy()
        for page in held[held[:, 1] >= kv_len, 0]:
            self.remove(request, int(page))
        for page, first, _ in held[(held[:, 1] < kv_len) & (held[:, 1] + held[:, 2] > kv_len)]:
            self._write(self.entry(request, int(page)), page, first, kv_len - first)

    def slide(self, request: int, start: int) -> None:
        region = self._regions.get(request)
        if region is None:
            return
        held = self.entries[region.start : region.start + region.length].copy()
        for page in held[held[:, 1] + held[:, 2] <= start, 0]:
            self.remove(request, int(page))

    def drop(self, request: int) -> None:
        region = self._regions.pop(request, None)
        if region is not None:
            self._free.setdefault(region.capacity, []).append(region.start)

    def clear(self) -> None:
        self.__init__(len(self.entries))
        self.stale = True

    def take_deltas(self, into: np.ndarray) -> bool:
        """Fill the first of `into` `[num, 4]` with the pending (entry, page, first, count), and forget them.
        False, with nothing taken, when the table must be uploaded whole (`upload`)."""
        if self.stale or len(self._pending) > len(into):
            return False
        if self._pending:
            changed = np.fromiter(self._pending, np.int32, len(self._pending))
            into[: len(changed), 0] = changed
            into[: len(changed), 1:] = self.entries[changed]
            self._pending.clear()
        return True

    def upload(self) -> np.ndarray:
        """A copy of the whole table, after which nothing is pending."""
        self.stale = False
        self._pending.clear()
        return self.entries.copy()

    def _write(self, entry: int, page: int, first: int, count: int) -> None:
        self.entries[entry] = page, first, count
        self._pending[entry] = None

    def _allocate(self, capacity: int) -> int | None:
        free = self._free.get(capacity)
        if free:
            return free.pop()
        if self._bump + capacity > len(self.entries):
            return None
        start, self._bump = self._bump, self._bump + capacity
        return start

    def _grow(self, request: int, region: _Region) -> None:
        capacity = max(2 * region.capacity, _MIN_REGION)
        start = self._allocate(capacity)
        if start is None:
            self._compact(request)
            return
        self.entries[start : start + region.length] = self.entries[region.start : region.start + region.length]
        self._pending.update(dict.fromkeys(range(start, start + region.length)))
        if region.capacity:
            self._free.setdefault(region.capacity, []).append(region.start)
        region.start, region.capacity = start, capacity

    def _compact(self, request: int) -> None:
        """Lay all regions out anew, one entry more for `request`. Half of what is spare goes to the regions, so that
        the next compaction is far; whatever their sizes, a table with a free entry takes one more."""
        used = sum(region.length for region in self._regions.values())
        spare = len(self.entries) - used - 1
        if spare < 0:
            raise TableFull(f"page table of {len(self.entries)} entries is full")
        old, self._bump, self._free = self.entries.copy(), 0, {}
        for owner, region in self._regions.items():
            held = old[region.start : region.start + region.length]
            region.start = self._bump
            region.capacity = region.length + spare * region.length // (2 * max(used, 1)) + (owner == request)
            self.entries[region.start : region.start + region.length] = held
            self._bump += region.capacity
        self.stale = True


class PageTables:
    """The page tables of all instances, kept in step with the commands."""

    def __init__(self, num_instances: int, num_entries: int, page_tokens: int):
        self.tables = [InstanceTable(num_entries) for _ in range(num_instances)]
        self._page_tokens = page_tokens

    def apply(self, command: AnyCommand) -> None:
        """Account for a command. A prefill's own pages are context only for later steps, so it is applied after the
        step is staged; a decode row's new page is read by the step itself, so that is applied before."""
        match command:
            case RunPrefill():
                for row in command.rows:
                    for home, page, run in zip(row.homes, row.pages, units(row.runs, self._page_tokens), strict=True):
                        self.tables[home].put(row.request, page, run)
                self._move(command.moves)
            case RunDecode():
                for row in command.rows:
                    self.tables[row.master].put(row.request, row.page, row.run)
            case Migrate():
                self._move(command.moves)
            case CopyPages():
                for copy in command.copies:
                    self.tables[command.instance].put(copy.request, copy.dst_page, copy.run)
            case Fork():
                for instance, page, run in command.shared:
                    self.tables[instance].put(command.child, page, run)
            case Truncate():
                for table in self.tables:
                    table.truncate(command.request, command.kv_len)
            case Slide():
                for table in self.tables:
                    table.slide(command.request, command.start)
            case Free():
                for instance in command.instances:
                    self.tables[instance].drop(command.request)
            case Reset():
                for instance in command.instances:
                    self.tables[instance].clear()

    def _move(self, moves: tuple[PageMove, ...]) -> None:
        for move in moves:
            self.tables[move.src].remove(move.request, move.src_page)
            self.tables[move.dst].put(move.request, move.dst_page, move.run)
