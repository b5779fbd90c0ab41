"""The ledger: which pages are free, who owns the others, and where the KV of each request lies (DESIGN 2, 8).

What it is: per-instance free lists and reference counts over a `RunTable`. Everything is committed when a step is
*issued*: a device runs its programs in order, so a page freed now may be given to any later step.
What it is not: a policy, or aware of steps in flight. It stores extents of pages: its cost grows with what is touched.

Invariants: INV-4 free + owned = capacity per instance. INV-5 each position of a request has one home; only a page
with one owner is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loong_jax.config import ClusterConfig
from loong_jax.runs import Dropped, PageRun, RunTable
from loong_jax.types import PageMove, Run


class InvariantError(RuntimeError):
    """A named invariant of DESIGN 8 does not hold: our bug, and never compiled away like an assert."""


class ForkedPages(NamedTuple):
    """`shared`: (instance, page, run) that the child now owns too. `copied`: (instance, source, destination, run)."""

    shared: tuple[tuple[int, int, Run], ...]
    copied: tuple[int, int, int, Run] | None


class Ledger:
    def __init__(self, cluster: ClusterConfig) -> None:
        self.page_tokens = cluster.page_tokens
        self.num_pages = cluster.pages_per_instance
        self.table = RunTable(cluster.page_tokens)
        self._table_entries = cluster.table_entries
        # Last in, first out: the choice of a page is a function of the history alone (INV-7).
        self._free = [list(range(self.num_pages - 1, -1, -1)) for _ in range(cluster.num_instances)]
        self._owners = [[0] * self.num_pages for _ in range(cluster.num_instances)]
        self._entries = [0] * cluster.num_instances
        self._tokens: dict[int, dict[int, int]] = {}
        self.changes = 0  # of the sets of instances that hold KV of a request

    # ---- questions

    def free_pages(self, instance: int) -> int:
        return len(self._free[instance])

    def tokens(self, request: int) -> dict[int, int]:
        """KV tokens of `request` by instance. The live dict: read only."""
        return self._tokens.get(request, {})

    def owners(self, instance: int, page: int) -> int:
        return self._owners[instance][page]

    def open_page(self, request: int, position: int, hint: int = -1) -> tuple[int, int] | None:
        """(instance, tokens held) of the page that the token at `position` may join: it ends there, has room and one
        owner. `hint`: the instance to look at first."""
        for instance in (hint, *self.tokens(request)):
            home = self.table.home(request, instance)
            if home is None or home.extents[-1].end != position:
                continue
            last = home.extents[-1]
            page, first = last.pages[-1], last.first + (len(last.pages) - 1) * self.page_tokens
            if position - first < self.page_tokens and self._owners[instance][page] == 1:
                return instance, position - first
            return None
        return None

    # ---- changes

    def reserve(self, instance: int, num_pages: int) -> list[int]:
        """Take pages from the free list; the caller commits them before the event is over."""
        free = self._free[instance]
        if not (num_pages <= len(free)):
            raise InvariantError(f"INV-4: instance {instance} has {len(free)} free pages, {num_pages} wanted")
        pages = free[: -num_pages - 1 : -1]  # from the end
        del free[len(free) - num_pages :]
        owners = self._owners[instance]
        for page in pages:
            owners[page] = 1
        return pages

    def commit(self, request: int, instance: int, pages: Sequence[int], run: Run) -> None:
        """`run` of `request` has its home in `pages`, as many as it takes, which were reserved."""
        if len(pages) != -(-run.count // self.page_tokens):
            raise InvariantError(f"INV-5: {len(pages)} pages for {run}")
        self._check_reserved(instance, pages)
        self.table.add(request, instance, pages, run)
        self._count(request, instance, run.count)
        self._entries[instance] += len(pages)

    def _check_reserved(self, instance: int, pages: Sequence[int]) -> None:
        owners = self._owners[instance]
        if [owners[page] for page in pages].count(1) != len(pages):
            raise InvariantError(f"INV-5: some of the pages {pages} of instance {instance} are not reserved")

    def extend(self, request: int, instance: int, position: int) -> tuple[int, Run]:
        """Home of the next token at `position` on `instance`: the open page if it is there, else a new page."""
        home = self.table.home(request, instance)
        if home is not None:
            last = home.extents[-1]
            page, first = last.pages[-1], last.first + (len(last.pages) - 1) * self.page_tokens
            count = position - first
            if (
                last.end == position
                and count < self.page_tokens
                and self._owners[instance][page] == 1  # INV-5: a shared page is never written
            ):
                last.end = position + 1
                self._tokens[request][instance] += 1
                return page, Run(first, count + 1)
        (page,) = self.reserve(instance, 1)
        run = Run(position, 1)
        self.commit(request, instance, (page,), run)
        return page, run

    def move(self, moves: Sequence[PageMove]) -> None:
        """Pages of one request, ascending, from one instance to one other. Each `dst_page` was reserved; the source
        pages lose this owner."""
        request, src, dst = moves[0].request, moves[0].src, moves[0].dst
        self._check_reserved(dst, [move.dst_page for move in moves])
        self.table.move(moves)
        num_tokens = sum([move.run.count for move in moves])
        self._count(request, src, -num_tokens)
        self._count(request, dst, num_tokens)
        self._entries[dst] += len(moves)
        self._release([(src, [move.src_page for move in moves])])

    def free(self, request: int, instances: Iterable[int]) -> None:
        """Drop all KV of `request` on `instances`."""
        instances = list(instances)
        self._release(self.table.drop(request, instances))
        held = self._tokens.get(request, {})
        for instance in instances:
            held.pop(instance, None)
        self.changes += 1
        if not held:
            self._tokens.pop(request, None)

    def truncate(self, request: int, kv_len: int) -> None:
        """Drop KV at positions from `kv_len` on."""
        self._release(self.table.truncate(request, kv_len))
        self._recount(request)

    def slide(self, request: int, start: int) -> int:
        """Drop pages that end at or before `start`; returns the first position after them. At least one does."""
        dropped, end = self.table.slide(request, start)
        if not dropped:
            raise InvariantError(f"INV-5: no page of request {request} ends by {start}")
        self._release(dropped)
        self._recount(request)
        return end

    def _recount(self, request: int) -> None:
        self.changes += 1
        counts = self.table.tokens(request)
        if counts:
            self._tokens[request] = counts
        else:
            self._tokens.pop(request, None)

    def fork(self, parent: int, child: int, kv_len: int, copy_on: frozenset[int]) -> ForkedPages:
        """The child gets the parent's KV of `[0, kv_len)`: every page is shared, except the one that the child's next
        token would join. That one is copied when its instance is in `copy_on` and has a free page; else the child
        goes without and recomputes it, as it does where an instance's page table is full."""
        shared: list[tuple[int, int, Run]] = []
        copied = None
        for instance in self.table.instances(parent):
            for entry in self.table.pages(parent, instance):
                run = Run(entry.first, min(entry.end, kv_len) - entry.first)
                if run.count <= 0:
                    break
                # Every free page may become an entry too; only sharing adds an entry without taking a page.
                if self._entries[instance] + len(self._free[instance]) >= self._table_entries:
                    break
                if run.end == kv_len and run.count < self.page_tokens:
                    if instance in copy_on and self._free[instance]:
                        (page,) = self.reserve(instance, 1)
                        self.commit(child, instance, (page,), run)
                        copied = (instance, entry.page, page, run)
                    continue
                shared.append((instance, entry.page, run))
                self._owners[instance][entry.page] += 1
                self._entries[instance] += 1
                self._count(child, instance, run.count)
        self.table.share(parent, child, shared)
        return ForkedPages(tuple(shared), copied)

    def _count(self, request: int, instance: int, tokens: int) -> None:
        held = self._tokens.setdefault(request, {})
        before = held.get(instance, 0)
        if before + tokens:
            held[instance] = before + tokens
        else:
            del held[instance]
        if before == 0 or before + tokens == 0:
            self.changes += 1

    def _release(self, dropped: Dropped) -> None:
        """Each page loses an owner."""
        for instance, pages in dropped:
            owners, free = self._owners[instance], self._free[instance]
            self._entries[instance] -= len(pages)
            for page in pages:
                left = owners[page] - 1
                if left < 0:
                    raise InvariantError(f"INV-4: page {page} of instance {instance} is already free")
                owners[page] = left
                if left == 0:
                    free.append(page)

    # ---- invariants

    def check(self) -> None:
        """INV-4 and the ledger's part of INV-5. Cost grows with all pages in use."""
        seen = [[0] * self.num_pages for _ in self._free]
        for request in self.table.requests():
            position = -1
            entries: list[PageRun] = []
            for instance in self.table.instances(request):
                pages = self.table.pages(request, instance)
                entries += pages
                if sum(entry.count for entry in pages) != self.tokens(request)[instance]:
                    raise InvariantError(f"INV-5: token count of request {request} on instance {instance}")
                for entry in pages:
                    seen[instance][entry.page] += 1
            for entry in sorted(entries):
                if not (entry.first >= position and 1 <= entry.count <= self.page_tokens):
                    raise InvariantError(f"INV-5: {request}: {entries}")
                position = entry.end
        if sorted(self._tokens) != self.table.requests():
            raise InvariantError("INV-5: token counts and tables name different requests")
        for instance, free in enumerate(self._free):
            if not (seen[instance] == self._owners[instance]):
                raise InvariantError(f"INV-4: owners of instance {instance}")
            if not (len(set(free)) == len(free)):
                raise InvariantError(f"INV-4: a page of instance {instance} is free twice")
            if not (all(seen[instance][page] == 0 for page in free)):
                raise InvariantError(f"INV-4: instance {instance} has a free page in use")
            used = sum(count > 0 for count in seen[instance])
            if not (len(free) + used == self.num_pages):
                raise InvariantError(f"INV-4: instance {instance}: {len(free)} + {used}")
            used_entries = sum(seen[instance])
            if used_entries != self._entries[instance] or used_entries + len(free) > self._table_entries:
                raise InvariantError(f"INV-4: the page table of instance {instance} may run over: {used_entries}")
