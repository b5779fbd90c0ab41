"""Prefill in the elastic policy: who is admitted, in which batch, on which group, and where the KV stays (DESIGN 4).

What it is not: a preemption of decodes; the instances of a batch are held until their queues have room.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax import buckets
from loong_jax.buckets import take
from loong_jax.cost import row_pairs
from loong_jax.policy import placement
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import Group, mask_of, members
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


class PrefillPlanner:
    """`decode_mask`: instances of the decode groups."""

    def __init__(self, draft: Draft, decode_mask: int) -> None:
        self.draft = draft
        self.decode_mask = decode_mask

    def plan(self, candidates: list[RequestView]) -> tuple[list[PlannedPrefill], list[Reservation]]:
        """Batches in order of arrival, on disjoint groups. A group that still has full queues is held for its batch."""
        # One prefill, then a decode: an instance with decode rows takes no second prefill before the first is done.
        fair = self.draft.alive
        for instance in self.draft.view.instances:
            if instance.prefilling and self.decode_mask >> instance.instance & 1:
                fair &= ~(1 << instance.instance)
        prefills: list[PlannedPrefill] = []
        reservations: list[Reservation] = []
        if not fair & self.draft.room:
            return prefills, reservations  # nothing to give, and nothing to hold
        candidates = self._admitted(candidates)
        while candidates and fair & self.draft.room & ~self.draft.taken:
            planned = self._batch(candidates, fair & ~self.draft.taken)
            if planned is None:
                candidates = candidates[1:]
                continue
            mask = mask_of(planned.instances)
            if mask & ~self.draft.room:
                until_us = self.draft.view.now_us + self.draft.limits.hold_us
                reservations.append(Reservation(planned.rows[0].request, planned.instances, until_us))
            else:
                prefills.append(planned)
            self.draft.taken |= mask
            started = {row.request for row in planned.rows}
            candidates = [request for request in candidates if request.request not in started]
        return prefills, reservations

    def _admitted(self, candidates: list[RequestView]) -> list[RequestView]:
        """Those with KV go on; a fresh one starts when all of it fits beside what the others still need, and none
        overtakes it."""
        headroom = self.draft.limits.decode_headroom_pages
        left = sum(self.draft.free[i] for i in members(self.draft.alive))
        holders = 0
        for request in self.draft.view.requests:
            if request.resident or request.in_flight:
                holders += 1
                left -= self.draft.pages_needed(request)
        out: list[RequestView] = []
        open_for_fresh = True
        for request in candidates:
            if request.resident:
                out.append(request)
                continue
            pages = self.draft.pages_needed(request)
            if open_for_fresh and (left >= pages + headroom or holders == 0):
                out.append(request)
                left -= pages
                holders += 1
            else:
                open_for_fresh = False
        return out

    def _batch(self, candidates: list[RequestView], allowed: int) -> PlannedPrefill | None:
        """The first candidate, with as many after it as fit into one chunk; less when that does not fit anywhere."""
        head = candidates[0]
        need = mask_of(r.instance for r in head.resident)
        if need & ~allowed:
            return None
        chunk_tokens = min(self.draft.limits.chunk_tokens, self._largest(head, need, allowed))
        chunk = max(1, chunk_tokens // self.draft.cluster.page_tokens)
        joiners = [
            c for c in candidates[1:] if c.score == head.score and mask_of(r.instance for r in c.resident) & ~need == 0
        ]
        budget = chunk
        while budget:
            rows = self._rows(head, joiners, budget)
            group, form = self._best_group(rows, need, allowed, self._waiting_tokens(candidates, rows))
            if group is not None:
                return self._place(rows, group, form)
            if len(rows) > 1:
                joiners = joiners[: (len(rows) - 1) // 2]
            else:
                budget = min(budget, self._units(rows)) // 2
        self._starved(head, need, allowed)
        return None

    def _largest(self, head: RequestView, need: int, allowed: int) -> int:
        """Tokens of the largest step that a group may take: asking for more would only be halved again and again."""
        groups = self.draft.ready.covering(head.prefill_phase, need, allowed)
        return max((group.bucket * group.dop for group in groups), default=0)

    def _rows(
        self, head: RequestView, joiners: Sequence[RequestView], budget: int
    ) -> list[tuple[RequestView, tuple[Run, ...]]]:
        """Requests with the runs they compute, `budget` units in all. The head leaves half to those behind it."""
        page_tokens = self.draft.cluster.page_tokens
        wanted = sum(buckets.num_units(j.missing, page_tokens) for j in joiners)
        share = budget - min(wanted, budget // 2)
        rows = [(head, take(head.missing, share, page_tokens))]
        left = budget - self._units(rows)
        for joiner in joiners[: self.draft.cluster.ladder.prefill_rows - 1]:
            if left <= 0:
                break
            rows.append((joiner, take(joiner.missing, left, page_tokens)))
            left -= self._units(rows[-1:])
        return rows

    def _waiting_tokens(
        self, candidates: Sequence[RequestView], rows: Sequence[tuple[RequestView, tuple[Run, ...]]]
    ) -> int:
        """What the other candidates could compute beside this batch, a chunk each at most."""
        planned = {request.request for request, _ in rows}
        return sum(
            min(self.draft.limits.chunk_tokens, sum(run.count for run in c.missing))
            for c in candidates
            if c.request not in planned
        )

    def _units(self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]]) -> int:
        return sum(buckets.num_units(runs, self.draft.cluster.page_tokens) for _, runs in rows)

    def _best_group(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], need: int, allowed: int, waiting_tokens: int
    ) -> tuple[Group | None, ContextForm]:
        """The group with the best predicted time: alone, a prompt takes the fastest; when others wait, instances are
        shared out among them. Groups whose memory holds the prompts to their end come first."""
        page_tokens, headroom = self.draft.cluster.page_tokens, self.draft.limits.decode_headroom_pages
        num_units = self._units(rows)
        lengths = [(sum(run.count for run in runs), sum(r.tokens for r in request.resident)) for request, runs in rows]
        tokens, context = sum(new for new, _ in lengths), sum(resident for _, resident in lengths)
        pairs = sum(row_pairs(new, resident) for new, resident in lengths)
        whole = sum(self.draft.pages_needed(request) + headroom for request, _ in rows)
        num_allowed = allowed.bit_count()
        best: tuple[Group | None, ContextForm] = (None, ContextForm.RING)
        best_key = None
        for group in self.draft.ready.covering(rows[0][0].prefill_phase, need, allowed):
            per_instance = -(-num_units // group.dop) * page_tokens
            free = sum(self.draft.free[i] for i in group.instances)
            if per_instance > group.bucket or free < num_units:
                continue
            form, seconds = self._form(group.dop, tokens, pairs, context)
            rows_held_up = sum(self.draft.load[i] for i in group.instances)
            waves = max(1.0, (1 + waiting_tokens / tokens) * group.dop / num_allowed)
            key = (free < whole, seconds * waves, rows_held_up, -free, group.instances)
            if best_key is None or key < best_key:
                best, best_key = (group, form), key
        return best

    def _form(self, dop: int, tokens: int, pairs: float, context: int) -> tuple[ContextForm, float]:
        ring_s = self.draft.cost.prefill_s(dop, tokens, pairs, context, ContextForm.RING)
        if context == 0:
            return ContextForm.RING, ring_s
        gather_s = self.draft.cost.prefill_s(dop, tokens, pairs, context, ContextForm.GATHER_Q)
        return (ContextForm.GATHER_Q, gather_s) if gather_s < ring_s else (ContextForm.RING, ring_s)

    def _place(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], group: Group, form: ContextForm
    ) -> PlannedPrefill:
        """Even on the way, packed at a prompt's end."""
        keep: list[Share] = []
        rehome: list[Rehome] = []
        later = self._units(rows)
        free = dict(self.draft.free)
        for request, runs in rows:
            num_units = buckets.num_units(runs, self.draft.cluster.page_tokens)
            later -= num_units
            if runs[-1].end == request.known and self._spare(group, free) >= num_units + later:
                headroom = self.draft.limits.decode_headroom_pages
                placed = placement.packed(request, num_units, group.instances, free, headroom, self.draft.load)
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

    def _place_even(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], group: Group, form: ContextForm
    ) -> PlannedPrefill:
        keep: list[Share] = []
        for request, runs in rows:
            num_units = buckets.num_units(runs, self.draft.cluster.page_tokens)
            keep += placement.even(request, num_units, group.instances, self.draft.free).keep
        planned_rows = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
        return PlannedPrefill(group.instances, form, planned_rows, tuple(keep), score=rows[0][0].score)

    @staticmethod
    def _spare(group: Group, free: dict[int, int]) -> int:
        return sum(free[i] for i in group.instances)

    def _starved(self, head: RequestView, need: int, allowed: int) -> None:
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
