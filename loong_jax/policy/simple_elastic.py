"""The first elastic policy: simple, honest, and able to serve whatever the pool can hold (DESIGN 4).

Dispatch in order of arrival; DoP by predicted time; chunked prefill that leaves room for decodes; scale down to the
fewest instances at a prompt's end; masters by rows; one instance more when memory is short; evict and recompute the
newest when nothing else helps. What it is not: the four-step policy of the paper, which weighs gain against cost.

Progress. Let r be the oldest request that holds KV. If r lacks a page, newer holders are evicted until it has one; if
it holds all KV alone and still lacks one, its pages are fragmented, and it is recomputed into whole pages. So r ends,
and so does every request after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax import buckets
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy import placement
from loong_jax.policy.groups import Group, ReadyGroups, mask_of, members
from loong_jax.types import (
    ContextForm,
    Phase,
    Plan,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedEvict,
    PlannedPrefill,
    PlannedPrefillRow,
    PlannedPrepare,
    Program,
    Rehome,
    RequestView,
    Reservation,
    Run,
    Share,
    View,
)

MAX_QUEUED_STEPS = 2
_EMPTY = Plan()


class SimpleElastic:
    """One object per manager. It remembers nothing but an index of the READY programs."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig) -> None:
        self.cluster = cluster
        self.limits = limits
        self._ready: frozenset[tuple[Program, tuple[int, ...]]] | None = None
        self._groups = ReadyGroups(frozenset())

    def plan(self, view: View, cost: CostModel) -> Plan:
        if self._ready is not view.ready:
            self._ready, self._groups = view.ready, ReadyGroups(view.ready)
        return _Planner(self.cluster, self.limits, self._groups, view, cost).plan()


class _DecodeGroup:
    """Decode rows whose KV ties them together. `need`: where that is; `group`: what will serve them, if READY."""

    __slots__ = ("group", "need", "rows")

    def __init__(self, need: int, group: Group | None, rows: list[RequestView]) -> None:
        self.need = need
        self.group = group
        self.rows = rows

    @property
    def mask(self) -> int:
        return self.group.mask if self.group is not None else self.need


class _Planner:
    """One plan. `free`, `room` and `taken` say what is left as the plan grows."""

    def __init__(
        self, cluster: ClusterConfig, limits: LimitsConfig, groups: ReadyGroups, view: View, cost: CostModel
    ) -> None:
        self.cluster, self.limits, self.groups, self.view, self.cost = cluster, limits, groups, view, cost
        self.free = {i.instance: i.free_pages for i in view.instances}
        self.alive = self.room = 0
        for instance in view.instances:
            if instance.alive:
                self.alive |= 1 << instance.instance
                if instance.queued < MAX_QUEUED_STEPS:
                    self.room |= 1 << instance.instance
        self.taken = 0  # instances planned or held
        self.load = [0] * len(view.instances)  # decode rows by instance
        self.prepares: list[PlannedPrepare] = []
        self.blocked: RequestView | None = None  # the oldest request that lacks pages
        self.stuck: list[RequestView] = []  # no group can span their KV: an instance was lost

    def plan(self) -> Plan:
        if not self.room:
            return _EMPTY
        decoding: list[RequestView] = []
        prefilling: list[RequestView] = []
        for request in self.view.requests:
            if request.running:
                if request.issued < request.prompt_len + request.max_tokens:
                    decoding.append(request)
            elif request.in_flight == 0:
                prefilling.append(request)
        decode_groups = self._decode_groups(decoding)
        prefills, reservations = self._prefills(prefilling, decode_groups) if prefilling else ([], [])
        decodes = self._decodes(decode_groups)
        stuck = tuple(PlannedEvict(request.request) for request in self.stuck if request.in_flight == 0)
        if stuck:
            return Plan(evicts=stuck)
        if self.blocked is not None:
            victim = self._victim(self.blocked)
            if victim is not None and victim.in_flight == 0:
                return Plan(evicts=(PlannedEvict(victim.request),), prepares=tuple(self.prepares))
            if victim is not None:  # its steps must come back first
                decodes = _without(decodes, victim.request)
        if not (prefills or decodes or self.prepares or reservations):
            return _EMPTY
        return Plan(
            prefills=tuple(prefills),
            decodes=tuple(decodes),
            prepares=tuple(self.prepares),
            reservations=tuple(reservations),
        )

    # ---- decode

    def _decode_groups(self, decoding: Sequence[RequestView]) -> list[_DecodeGroup]:
        """Rows that share an instance are served together, as far as a READY group spans them all."""
        out: list[_DecodeGroup] = []
        for request in decoding:
            resident = request.resident
            if len(resident) == 1:
                need = 1 << resident[0].instance
            elif resident:
                need = mask_of(r.instance for r in resident)
            else:
                need = 1 << self._emptiest()
            for group in out:
                if group.need & need == need:  # the common case
                    group.rows.append(request)
                    break
            else:
                group = _DecodeGroup(need, self.groups.smallest(Phase.DECODE, need, self.alive), [request])
                if group.group is None and not self._want(Phase.DECODE, need, 1):
                    self.stuck.append(request)
                out.append(group)
                self._merge(out, group)
        for group in out:
            if group.group is not None and group.group.mask != group.need:
                self._want(Phase.DECODE, group.need, len(group.rows))
            for instance in members(group.mask):
                self.load[instance] += len(group.rows)
        # Groups that overlap and cannot merge take turns.
        out.sort(key=lambda group: (min(row.in_flight for row in group.rows), group.rows[0].request))
        return out

    def _emptiest(self) -> int:
        return max(members(self.alive), key=lambda i: (self.free[i], -i))

    def _merge(self, out: list[_DecodeGroup], group: _DecodeGroup) -> None:
        """Take in the groups that `group` overlaps, where a READY group spans both."""
        merged = True
        while merged:
            merged = False
            for other in out:
                if other is group or not other.mask & group.mask:
                    continue
                cover = self.groups.smallest(Phase.DECODE, group.need | other.need, self.alive)
                if cover is not None:
                    out.remove(other)
                    group.need |= other.need
                    group.group = cover
                    group.rows = sorted(group.rows + other.rows, key=lambda row: row.request)
                    merged = True
                    break

    def _decodes(self, decode_groups: list[_DecodeGroup]) -> list[PlannedDecode]:
        out: list[PlannedDecode] = []
        for group in list(decode_groups):
            if group not in decode_groups or group.group is None or not self._may_run(group):
                continue  # joined another on the way, or has to wait
            rows, needy = self._masters(group.group, group.rows)
            if needy:
                self._scale_up(decode_groups, group, len(needy))
                if not self._may_run(group):
                    continue
                rows, needy = self._masters(group.group, group.rows)
                if needy:
                    self._block(needy[0])
            if rows:
                out.append(PlannedDecode(group.group.instances, tuple(rows)))
                self.taken |= group.mask
        return out

    def _may_run(self, group: _DecodeGroup) -> bool:
        return group.mask & ~(self.room & ~self.taken) == 0

    def _masters(self, group: Group, rows: Sequence[RequestView]) -> tuple[list[PlannedDecodeRow], list[RequestView]]:
        """A master per row: the holder of its open page, else the holder with the fewest rows that has a free page,
        else any other member. Also the rows that find no page in the group; the oldest are served first."""
        out: list[PlannedDecodeRow] = []
        needy: list[RequestView] = []
        instances, bucket, free = group.instances, group.bucket, self.free
        counts, used = dict.fromkeys(instances, 0), dict.fromkeys(instances, 0)
        for row in rows:
            device = row.device_group
            if row.open_page is not None:
                master = row.open_page[0]
                if counts[master] >= bucket or (device and master not in device):
                    continue
            else:
                spare = [i for i in instances if free[i] > used[i]]
                if not spare:
                    needy.append(row)
                    continue
                spare = [i for i in spare if counts[i] < bucket and (not device or i in device)]
                if not spare:
                    continue  # waits for the host, or for rows to leave
                held = {r.instance for r in row.resident}
                master = min(spare, key=lambda i: (i not in held, counts[i], -free[i], i))
                used[master] += 1
            counts[master] += 1
            out.append(PlannedDecodeRow(row.request, master))
        return out, needy

    def _scale_up(self, decode_groups: list[_DecodeGroup], group: _DecodeGroup, num_pages: int) -> None:
        """Instances more, for their free pages: nothing moves. The smallest group that has enough, or that has most."""
        assert group.group is not None
        best, most = group.group, sum(self.free[i] for i in group.group.instances)
        for wider in self.groups.covering(Phase.DECODE, group.mask, self.alive):
            free = sum(self.free[i] for i in wider.instances)
            if free > most:
                best, most = wider, free
            if most >= num_pages:
                break
        if best is not group.group:
            group.group, group.need = best, best.mask
            self._merge(decode_groups, group)

    # ---- prefill

    def _prefills(
        self, candidates: list[RequestView], decode_groups: list[_DecodeGroup]
    ) -> tuple[list[PlannedPrefill], list[Reservation]]:
        """Batches in order of arrival, on disjoint groups. A group that still has full queues is held for its batch."""
        decode_mask = 0
        for group in decode_groups:
            decode_mask |= group.mask
        # One prefill, then a decode: an instance with decode rows takes no second prefill before the first is done.
        fair = self.alive
        for instance in self.view.instances:
            if instance.prefilling and decode_mask >> instance.instance & 1:
                fair &= ~(1 << instance.instance)
        prefills: list[PlannedPrefill] = []
        reservations: list[Reservation] = []
        if not fair & self.room:
            return prefills, reservations  # nothing to give, and nothing to hold
        candidates = self._admitted(candidates)
        while candidates and fair & self.room & ~self.taken:
            planned = self._batch(candidates, fair & ~self.taken)
            if planned is None:
                candidates = candidates[1:]
                continue
            mask = mask_of(planned.instances)
            if mask & ~self.room:
                until_us = self.view.now_us + self.limits.hold_us
                reservations.append(Reservation(planned.rows[0].request, planned.instances, until_us))
            else:
                prefills.append(planned)
            self.taken |= mask
            started = {row.request for row in planned.rows}
            candidates = [request for request in candidates if request.request not in started]
        return prefills, reservations

    def _admitted(self, candidates: list[RequestView]) -> list[RequestView]:
        """Those with KV go on; a fresh one starts when all of it fits beside what the others still need, and none
        overtakes it."""
        page_tokens, headroom = self.cluster.page_tokens, self.limits.decode_headroom_pages
        left = sum(self.free[i] for i in members(self.alive))
        holders = 0
        for request in self.view.requests:
            if request.resident or request.in_flight:
                holders += 1
                left -= buckets.num_units(request.missing, page_tokens)
        out: list[RequestView] = []
        open_for_fresh = True
        for request in candidates:
            if request.resident:
                out.append(request)
                continue
            pages = buckets.num_units(request.missing, page_tokens)
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
        chunk = max(1, self.limits.chunk_tokens // self.cluster.page_tokens)
        joiners = [c for c in candidates[1:] if mask_of(r.instance for r in c.resident) & ~need == 0]
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

    def _rows(
        self, head: RequestView, joiners: Sequence[RequestView], budget: int
    ) -> list[tuple[RequestView, tuple[Run, ...]]]:
        """Requests with the runs they compute, `budget` units in all. The head leaves half to those behind it."""
        page_tokens = self.cluster.page_tokens
        wanted = sum(buckets.num_units(j.missing, page_tokens) for j in joiners)
        share = budget - min(wanted, budget // 2)
        rows = [(head, _take(head.missing, share, page_tokens))]
        left = budget - self._units(rows)
        for joiner in joiners[: self.cluster.ladder.prefill_rows - 1]:
            if left <= 0:
                break
            rows.append((joiner, _take(joiner.missing, left, page_tokens)))
            left -= self._units(rows[-1:])
        return rows

    def _waiting_tokens(
        self, candidates: Sequence[RequestView], rows: Sequence[tuple[RequestView, tuple[Run, ...]]]
    ) -> int:
        """What the other candidates could compute beside this batch, a chunk each at most."""
        planned = {request.request for request, _ in rows}
        return sum(
            min(self.limits.chunk_tokens, sum(run.count for run in c.missing))
            for c in candidates
            if c.request not in planned
        )

    def _units(self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]]) -> int:
        return sum(buckets.num_units(runs, self.cluster.page_tokens) for _, runs in rows)

    def _best_group(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], need: int, allowed: int, waiting_tokens: int
    ) -> tuple[Group | None, ContextForm]:
        """The group with the best predicted time: alone, a prompt takes the fastest; when others wait, instances are
        shared out among them. Groups whose memory holds the prompts to their end come first."""
        page_tokens, headroom = self.cluster.page_tokens, self.limits.decode_headroom_pages
        num_units = self._units(rows)
        tokens = sum(run.count for _, runs in rows for run in runs)
        context = sum(r.tokens for request, _ in rows for r in request.resident)
        whole = sum(buckets.num_units(request.missing, page_tokens) + headroom for request, _ in rows)
        num_allowed = allowed.bit_count()
        best: tuple[Group | None, ContextForm] = (None, ContextForm.RING)
        best_key = None
        for group in self.groups.covering(Phase.PREFILL, need, allowed):
            per_instance = -(-num_units // group.dop) * page_tokens
            free = sum(self.free[i] for i in group.instances)
            if per_instance > group.bucket or free < num_units:
                continue
            form, seconds = self._form(group.dop, tokens, context)
            rows_held_up = sum(self.load[i] for i in group.instances)
            waves = max(1.0, (1 + waiting_tokens / tokens) * group.dop / num_allowed)
            key = (free < whole, seconds * waves, rows_held_up, -free, group.instances)
            if best_key is None or key < best_key:
                best, best_key = (group, form), key
        return best

    def _form(self, dop: int, tokens: int, context: int) -> tuple[ContextForm, float]:
        ring_s = self.cost.prefill_s(dop, tokens, context, ContextForm.RING)
        if context == 0:
            return ContextForm.RING, ring_s
        gather_s = self.cost.prefill_s(dop, tokens, context, ContextForm.GATHER_Q)
        return (ContextForm.GATHER_Q, gather_s) if gather_s < ring_s else (ContextForm.RING, ring_s)

    def _place(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], group: Group, form: ContextForm
    ) -> PlannedPrefill:
        """Even on the way, packed at a prompt's end."""
        keep: list[Share] = []
        rehome: list[Rehome] = []
        later = self._units(rows)
        free = dict(self.free)
        for request, runs in rows:
            num_units = buckets.num_units(runs, self.cluster.page_tokens)
            later -= num_units
            if runs[-1].end == request.known and self._spare(group, free) >= num_units + later:
                headroom = self.limits.decode_headroom_pages
                placed = placement.packed(request, num_units, group.instances, free, headroom, self.load)
            else:
                placed = placement.even(request, num_units, group.instances, free)
            if self._spare(group, free) < later:  # re-homing took what a later row needs
                return self._place_even(rows, group, form)
            keep += placed.keep
            rehome += placed.rehome
        planned_rows = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
        for share in keep:
            self.load[share.instance] += 1
        self.free = free
        form = ContextForm.RING if rehome else form
        return PlannedPrefill(group.instances, form, planned_rows, tuple(keep), tuple(rehome))

    def _place_even(
        self, rows: Sequence[tuple[RequestView, tuple[Run, ...]]], group: Group, form: ContextForm
    ) -> PlannedPrefill:
        keep: list[Share] = []
        for request, runs in rows:
            num_units = buckets.num_units(runs, self.cluster.page_tokens)
            keep += placement.even(request, num_units, group.instances, self.free).keep
        planned_rows = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
        return PlannedPrefill(group.instances, form, planned_rows, tuple(keep))

    @staticmethod
    def _spare(group: Group, free: dict[int, int]) -> int:
        return sum(free[i] for i in group.instances)

    # ---- when something is missing

    def _starved(self, head: RequestView, need: int, allowed: int) -> None:
        """Not even one page of the head could be planned: for want of memory, of a program, or of idle instances?"""
        if self.groups.smallest(Phase.PREFILL, need, self.alive) is None:
            if not self._want(Phase.PREFILL, need or self.alive & -self.alive, 1) and head.resident:
                self.stuck.append(head)
            return
        groups = self.groups.covering(Phase.PREFILL, need, self.alive)
        if head.resident and not any(self.free[i] > 0 for group in groups for i in group.instances):
            self._block(head)

    def _block(self, request: RequestView) -> None:
        if self.blocked is None or request.request < self.blocked.request:
            self.blocked = request

    def _victim(self, blocked: RequestView) -> RequestView | None:
        """The newest holder of KV within reach that is newer than `blocked`; itself, if it is the only holder there."""
        need = mask_of(r.instance for r in blocked.resident)
        phase = Phase.DECODE if blocked.running else Phase.PREFILL
        reach = self.groups.reach(phase, need, self.alive)
        holders = [request for request in self.view.requests if any(reach >> r.instance & 1 for r in request.resident)]
        if not holders:
            return None
        newest = holders[-1]
        return newest if newest.request > blocked.request or len(holders) == 1 and newest is blocked else None

    def _want(self, phase: Phase, need: int, size: int) -> bool:
        """Ask for a program of `size` rows or tokens, on the smallest set that covers `need`. False when there is
        nothing to ask for: it is READY, or no group of the ladder can cover `need`."""
        ladder = self.cluster.ladder
        sizes = ladder.decode_rows if phase is Phase.DECODE else ladder.prefill_tokens
        bucket = next((b for b in sizes if b >= size), sizes[-1])
        prepare = self.groups.wanted(phase, need, self.alive, bucket, self.cluster)
        if prepare is not None:
            self.prepares.append(prepare)
        return prepare is not None


def _take(missing: tuple[Run, ...], num_units: int, page_tokens: int) -> tuple[Run, ...]:
    """The first runs of `missing`, `num_units` units at most; a cut falls on a page boundary where it can."""
    out: list[Run] = []
    for run in missing:
        if num_units <= 0:
            break
        end = min(run.end, run.first + num_units * page_tokens)
        if end < run.end and end - end % page_tokens > run.first:
            end -= end % page_tokens
        out.append(Run(run.first, end - run.first))
        num_units -= -(-(end - run.first) // page_tokens)
    return tuple(out)


def _without(decodes: list[PlannedDecode], request: int) -> list[PlannedDecode]:
    out: list[PlannedDecode] = []
    for decode in decodes:
        rows = tuple(row for row in decode.rows if row.request != request)
        if rows:
            out.append(PlannedDecode(decode.instances, rows))
    return out
