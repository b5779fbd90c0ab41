"""Prefill in the elastic policy: from candidates in order to steps on groups, in chunks, and where KV stays.

What it is: fresh requests are batched together (`batch.py`) on the instances that are open; one that has KV goes on
alone, on a group that holds all of it; a chunk ends with the time its instances have for it. A group whose instances
are not all open is reserved for the first who needs it: they get nothing new, so it is free when their steps are done.
What it is not: the order (`dispatch.py`), the time (`allocate.py`), or the layout within a group (`placement.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loong_jax import buckets
from loong_jax.cost import row_pairs
from loong_jax.policy import placement
from loong_jax.policy.allocate import PACE, Allowance
from loong_jax.policy.batch import INFINITE, Batch, Batching, Shape, Slots, Work
from loong_jax.policy.dispatch import Candidate, weight_of
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import Group, mask_of, members
from loong_jax.policy.long_prompts import LongPrompts
from loong_jax.policy.times import Times
from loong_jax.types import (
    ContextForm,
    PlannedPrefill,
    PlannedPrefillRow,
    Rehome,
    RequestView,
    Reservation,
    Run,
    Share,
)

BESIDE = 1 << 20
"""Rows that an instance counts as more, to who looks for a place to decode, where a long prompt is under way."""
LEND = 0.2
"""Where a quarter of the instances is all that prompts find, a row's wait counts less by so much."""

Rows = Sequence[tuple[RequestView, tuple[Run, ...]]]


class _Alone(NamedTuple):
    """A step of one request: `cost` per token of it."""

    fits: bool
    cost: float
    group: Group
    units: int
    form: ContextForm


class PrefillPlanner:
    """`price`: what a second of one instance costs those who wait, by normalised latency."""

    def __init__(
        self, draft: Draft, times: Times, allowance: Allowance, price: float, long: LongPrompts | None = None
    ) -> None:
        self.draft, self.times, self.allowance, self.price = draft, times, allowance, price
        self.long = long or LongPrompts(draft, times, ())
        self._page_tokens = draft.cluster.page_tokens
        self.prefills: list[PlannedPrefill] = []
        self.reservations: list[Reservation] = []

    @property
    def any_open(self) -> bool:
        """Whether an instance is left that somebody may start on."""
        return (self.allowance.open | self.allowance.urgent) & ~self.draft.taken & ~self.draft.held != 0

    def plan(self, candidates: Sequence[Candidate]) -> None:
        """Each in its turn, until no instance is open."""
        left = list(candidates)
        most = min(self.draft.limits.batch_candidates, self.draft.cluster.ladder.prefill_rows)
        while left and self.any_open:
            head = left[0]
            started: set[int] = set()
            if not head.request.kv:
                started = self._batches(_cohort(left, most))
            if not started:
                self._alone(head)
                started = {head.request.request}
            left = [candidate for candidate in left if candidate.request.request not in started]

    def _open(self, candidate: Candidate) -> int:
        """Instances that `candidate` may start on now."""
        allowed = self.allowance.open | (self.allowance.urgent if candidate.urgent else 0)
        return allowed & ~self.draft.taken & ~self.draft.held

    # ---- fresh requests, together

    def _batches(self, cohort: list[Candidate]) -> set[int]:
        """Split the cohort, or its shorter part, over the open instances; returns who starts."""
        allowed = self._open(cohort[0])
        order = self._instances(allowed)
        slots = self._slots(order, cohort[0])
        dops = sorted({dop for _, dop in slots.shapes})
        if not dops:
            return set()
        cohort = sorted(cohort, key=lambda c: (c.tokens, c.request.request))
        work = {dop: [self._work(c, dop, slots) for c in cohort] for dop in dops}
        headroom = self.draft.limits.decode_headroom_pages
        first = [max(works[k].tokens for works in work.values()) // self._page_tokens for k in range(len(cohort))]
        pages = [max(self.draft.pages_needed(c.request) + headroom, f) for c, f in zip(cohort, first, strict=True)]
        price = max(0.0, self.price - sum(c.weight for c in cohort) / len(self.draft.view.instances))
        batching = Batching(work, pages, slots, self.times.step_s, price)
        best = self._prefix(cohort, batching, len(order))
        started: set[int] = set()
        for batch in batching.batches(best):
            rows = [(c.request, self._first(c, work[batch.dop][k].tokens)) for k, c in _numbered(cohort, batch)]
            instances = tuple(sorted(order[batch.at : batch.at + batch.dop]))
            group = self.draft.ready.exactly(cohort[0].request.prefill_phase, mask_of(instances))
            assert group is not None
            self._issue(rows, group, ContextForm.RING)
            started |= {request.request for request, _ in rows}
        return started

    def _prefix(self, cohort: Sequence[Candidate], batching: Batching, num_open: int) -> int:
        """How many start now. Who does not waits for the work of those who do, and then takes its own time."""
        later = sum(c.weight * c.seconds for c in cohort)
        weight = sum(c.weight for c in cohort)
        best, least, floor = 0, INFINITE, 0
        for num, candidate in enumerate(cohort, start=1):
            later -= candidate.weight * candidate.seconds
            weight -= candidate.weight
            if batching.costs[num] == INFINITE:
                continue
            work_s = sum(batch.seconds * batch.dop for batch in batching.batches(num))
            total = batching.costs[num] + later + weight * work_s / num_open
            if total < least or (candidate.urgent and not floor):
                best, least = num, total
            floor = num if candidate.urgent else floor
        return best

    def _instances(self, allowed: int) -> list[int]:
        """Fullest first, as far as that matters: those with decode rows, then by use in eighths, then by number, so
        that neighbours stay together."""
        draft, view = self.draft, self.draft.view

        def key(i: int) -> tuple[bool, int, int]:
            used = 8 - 8 * draft.free[i] // view.instances[i].num_pages
            return (not self.allowance.home >> i & 1, -used, i)

        return sorted(members(allowed), key=key)

    def _slots(self, order: Sequence[int], head: Candidate) -> Slots:
        """The READY groups among neighbours of `order`; what a step of them may take; what it costs to land there."""
        draft, times = self.draft, self.times
        phase, most = head.request.prefill_phase, draft.limits.chunk_tokens
        shapes: dict[tuple[int, int], Shape] = {}
        widest = self.long.most_instances(head.request)
        landing = self.price * 2 * times.cost.migrate_s(head.tokens) if self.allowance.home else 0.0
        for at in range(len(order)):
            mask, budget_s = 0, self.long.chunk_s(head.request)
            for dop, instance in enumerate(order[at:], start=1):
                mask |= 1 << instance
                budget_s = min(budget_s, self.allowance.budget_s[instance])
                group = draft.ready.exactly(phase, mask) if dop in times.dops and dop <= widest else None
                if group is not None:
                    tokens = times.chunk_tokens(dop, 0, budget_s, min(most, group.bucket * dop))
                    shapes[at, dop] = Shape(tokens, 0.0 if mask & self.allowance.home else landing)
        few = len(order) <= draft.alive.bit_count() // 4
        stall = [draft.stall[i] * (LEND if few else 1.0) for i in order]
        return Slots([draft.free[i] for i in order], stall, shapes)

    def _work(self, candidate: Candidate, dop: int, slots: Slots) -> Work:
        """Its first chunk; a second of it counts as often as it has chunks."""
        most = max(shape.tokens for (_, d), shape in slots.shapes.items() if d == dop)
        page_tokens = self._page_tokens
        tokens = min(candidate.tokens, max(page_tokens, most - most % page_tokens))
        weight = candidate.weight * -(-candidate.tokens // tokens)
        padded = -(-tokens // page_tokens) * page_tokens  # a page is the unit that programs and pools know
        return Work(padded, row_pairs(tokens, 0), 0, weight)

    def _first(self, candidate: Candidate, tokens: int) -> tuple[Run, ...]:
        page_tokens = self._page_tokens
        return buckets.take(candidate.request.missing, -(-tokens // page_tokens), page_tokens)

    # ---- one alone

    def _alone(self, head: Candidate) -> None:
        """The next chunk of one request, on the group that computes it cheapest; or a hold on one."""
        request = head.request
        other = None if head.urgent else self.long.gives_way(request)
        if other is not None:
            if not self.reservations:
                until_us = self.draft.view.now_us + self.draft.limits.hold_us
                self.reservations.append(Reservation(other.request, members(self.draft.alive), until_us))
            return
        need = mask_of(request.kv)
        allowed = self._open(head)
        best = self._best_group(head, need, allowed)
        if best is not None and (best.fits or not self._hold(head, need, allowed)):
            self._issue(
                [(request, buckets.take(request.missing, best.units, self._page_tokens))], best.group, best.form
            )
        elif best is None and not self._hold(head, need, allowed):
            self._starved(request, need)

    def _best_group(self, head: Candidate, need: int, allowed: int) -> _Alone | None:
        """Least cost per token: its own latency, the price of the instances, the decodes that wait. Groups whose memory
        holds the prompt to its end come first."""
        if need & ~allowed:
            return None
        draft, request, page_tokens = self.draft, head.request, self._page_tokens
        resident = sum(request.kv.values())
        all_units = buckets.num_units(request.missing, page_tokens)
        whole = draft.pages_needed(request) + draft.limits.decode_headroom_pages
        best: _Alone | None = None
        most, chunk_s = self.long.most_instances(request), self.long.chunk_s(request)
        for group in draft.ready.covering(request.prefill_phase, need, allowed):
            if group.dop > most and best is not None and best.fits:
                continue
            free = sum(draft.free[i] for i in group.instances)
            budget_s = min(chunk_s, *[self.allowance.budget_s[i] for i in group.instances])
            units = min(free, group.bucket * group.dop // page_tokens, max(1, draft.limits.chunk_tokens // page_tokens))
            tokens = self.times.chunk_tokens(group.dop, resident, budget_s, head.tokens)
            units = min(units, all_units if tokens >= head.tokens else max(1, tokens // page_tokens))
            if not units:
                continue
            tokens = min(head.tokens, units * page_tokens)
            form, seconds = self.times.form(group.dop, tokens, row_pairs(tokens, resident), resident)
            stall = sum(draft.stall[i] for i in group.instances)
            cost = seconds * (head.weight + self.price * group.dop + stall) / tokens
            option = _Alone(free >= whole, cost, group, units, form)
            if best is None or (not option.fits, option.cost) < (not best.fits, best.cost):
                best = option
        return best

    def _hold(self, head: Candidate, need: int, allowed: int) -> bool:
        """Reserve the smallest group that would do, if some of it is busy now. One request at a time holds; decodes go
        on meanwhile."""
        draft = self.draft
        whole = draft.pages_needed(head.request) + draft.limits.decode_headroom_pages
        for group in draft.ready.covering(head.request.prefill_phase, need, draft.alive & ~draft.taken):
            if group.mask & ~allowed and sum(draft.free[i] for i in group.instances) >= whole:
                if not self.reservations:
                    until_us = draft.view.now_us + draft.limits.hold_us
                    self.reservations.append(Reservation(head.request.request, group.instances, until_us))
                    draft.held = group.mask
                return True
        return False

    # ---- issue

    def _issue(self, rows: Rows, group: Group, form: ContextForm) -> None:
        self.prefills.append(self._place(rows, group, form))
        self.draft.taken |= group.mask

    def _place(self, rows: Rows, group: Group, form: ContextForm) -> PlannedPrefill:
        """Even on the way, packed at a prompt's end."""
        keep: list[Share] = []
        rehome: list[Rehome] = []
        later = self._units(rows)
        free = dict(self.draft.free)
        # Where instances are wanted for prefill, rows gather; where they are not, each gets an instance of its own.
        load = [-count for count in self.draft.load] if self._wanted(rows) else self.draft.load
        if self.long.homes and not self.long.is_long(rows[0][0]):  # aside, where the rest of a long prompt is to come
            load = [count + (BESIDE if self.long.homes >> i & 1 else 0) for i, count in enumerate(load)]
        for request, runs in rows:
            num_units = buckets.num_units(runs, self._page_tokens)
            later -= num_units
            if runs[-1].end == request.known and self._spare(group, free) >= num_units + later:
                headroom = self.draft.limits.decode_headroom_pages
                most = self._readable(request, group)
                placed = placement.packed(request, num_units, group.instances, free, headroom, load, most)
            else:
                placed = placement.even(request, num_units, group.instances, free)
            if self._spare(group, free) < later:  # re-homing took what a later row needs
                return self._place_even(rows, group, form)
            keep += placed.keep
            rehome += placed.rehome
        planned_rows = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
        for share in keep:
            self.draft.load[share.instance] += 1
        self.draft.free = free
        form = ContextForm.RING if rehome else form
        return PlannedPrefill(group.instances, form, planned_rows, tuple(keep), tuple(rehome), rows[0][0].score)

    def _readable(self, request: RequestView, group: Group) -> dict[int, int]:
        """Pages of it that each instance reads within its token time, beside those that lie there."""
        cost, draft = self.times.cost, self.draft
        token_s = PACE * 1e-6 * (request.target.tpot_us or draft.limits.token_us)
        dop, pool = min(2, group.dop), draft.cluster.pages_per_instance
        base_s = cost.decode_s(dop, 1, 1, 0)
        pool_s = cost.decode_s(dop, 1, 1, pool * self._page_tokens) - base_s
        pages = int(pool * max(0.0, token_s - base_s) / pool_s) if pool_s > 0 else pool
        own = {resident.instance: resident.pages for resident in request.resident}
        return {i: max(0, pages - (pool - draft.free[i] - own.get(i, 0))) for i in group.instances}

    def _wanted(self, rows: Rows) -> bool:
        """Whether others than these wait for instances."""
        own = sum(weight_of(request) for request, _ in rows) / len(self.draft.view.instances)
        return self.price > own * 1.001

    def _place_even(self, rows: Rows, group: Group, form: ContextForm) -> PlannedPrefill:
        keep: list[Share] = []
        for request, runs in rows:
            num_units = buckets.num_units(runs, self._page_tokens)
            keep += placement.even(request, num_units, group.instances, self.draft.free).keep
        planned_rows = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
        return PlannedPrefill(group.instances, form, planned_rows, tuple(keep), score=rows[0][0].score)

    def _units(self, rows: Rows) -> int:
        return sum(buckets.num_units(runs, self._page_tokens) for _, runs in rows)

    @staticmethod
    def _spare(group: Group, free: dict[int, int]) -> int:
        return sum(free[i] for i in group.instances)

    def _starved(self, head: RequestView, need: int) -> None:
        """Not even one page of the head could be planned: for want of memory, of a program, or of idle instances?"""
        phase = head.prefill_phase
        if self.draft.ready.smallest(phase, need, self.draft.alive) is None:
            if not self.draft.want(phase, need or self.draft.alive & -self.draft.alive, 1) and head.resident:
                self.draft.stuck.append(head)
            return
        groups = self.draft.ready.covering(phase, need, self.draft.alive)
        if head.resident and not any(self.draft.free[i] > 0 for group in groups for i in group.instances):
            if not (head.score and self.draft.want(phase, need, 1, self._least_dop(head))):
                self.draft.block(head)

    def _least_dop(self, head: RequestView) -> int:
        """Instances that can hold all of the head. Of ordinary programs the largest group is always READY; scoring ones
        are made as they are wanted."""
        num_pages = sum(r.pages for r in head.resident) + self.draft.pages_needed(head)
        return -(-num_pages // self.draft.cluster.pages_per_instance)


def _cohort(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The fresh ones at the front that may share a step with the first."""
    out: list[Candidate] = []
    for candidate in candidates:
        if len(out) == most or candidate.request.kv:
            break
        if _kind(candidate) == _kind(candidates[0]):
            out.append(candidate)
    return out


def _kind(candidate: Candidate) -> tuple[bool, bool, int]:
    """Those of one kind may share a step, the shortest first."""
    return candidate.request.score, candidate.urgent, candidate.request.target.priority


def _numbered(cohort: Sequence[Candidate], batch: Batch) -> list[tuple[int, Candidate]]:
    return [(k, cohort[k]) for k in range(batch.first, batch.last)]
