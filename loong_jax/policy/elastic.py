"""The elastic policy: LoongServe's four steps, planned group by group as instances become free (DESIGN 4).

Dispatch ranks who waits and admits what memory will hold; allocation says which instances prefill may take beside the
decodes, and for how long; batching splits requests over them; scaling leaves KV where decoding is cheap, and widens
what runs short of it. Where nothing but decoding goes on, the last decision is taken again.
What it is not: a memory of decisions. Everything kept here is a faster way to what the view says.

Progress. Let r be the oldest request that holds KV. If r lacks a page, newer holders are evicted until it has one; if
it holds all KV alone and still lacks one, its pages are fragmented, and it is recomputed into whole pages. A request
that waited long is urgent, and goes first. So r ends, and so does every request after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy import allocate, dispatch
from loong_jax.policy.again import NOTHING, Again
from loong_jax.policy.dispatch import Candidate, Line
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import ReadyGroups, mask_of
from loong_jax.policy.long_prompts import LongPrompts
from loong_jax.policy.prefill import PrefillPlanner
from loong_jax.policy.scale import DecodePlanner
from loong_jax.policy.times import Times
from loong_jax.types import (
    Plan,
    PlannedDecode,
    PlannedEvict,
    PlannedMigrate,
    PlannedPrefill,
    Program,
    RequestView,
    Reservation,
    View,
)


class Elastic:
    """One object per manager."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig) -> None:
        self.cluster = cluster
        self.limits = limits
        self._ready: frozenset[tuple[Program, tuple[int, ...]]] | None = None
        self._groups = ReadyGroups(frozenset())
        self._line = Line(limits)
        self._times: Times | None = None
        self._again = Again()

    def plan(self, view: View, cost: CostModel) -> Plan:
        again = self._again.plan(view.version, view.instances)
        if again is not None:
            return again
        if self._ready is not view.ready:
            self._ready, self._groups = view.ready, ReadyGroups(view.ready)
        if self._times is None or self._times.cost is not cost:
            self._times = Times(self.cluster, cost)
            self._line.clear()
        draft = Draft(self.cluster, self.limits, self._groups, view, cost)
        if not draft.room:
            return NOTHING
        return self._four_steps(draft, self._times)

    def _four_steps(self, draft: Draft, times: Times) -> Plan:
        view = draft.view
        active = view.active
        decoding, lacking = _split(active)
        pausing = [request for request in lacking if request.in_flight == 0]
        places = view.free_places
        self._line.follow(view.waiting, times.alone_s)
        fresh: list[Candidate] = []
        for candidate in self._line.top(view.now_us, self.limits.batch_candidates):
            if not candidate.request.running:
                fresh.append(candidate)
            elif places > 0:  # a prompt of one token has nothing to prefill
                decoding.append(candidate.request)
                places -= 1
        decode = DecodePlanner(draft, decoding)  # first: where rows decode sways where prompts go
        long = LongPrompts(draft, times, lacking)
        draft.lean = long.under_way()
        begun = dispatch.under_way(pausing, view.now_us, times.alone_s, self.limits)
        migrates: list[PlannedMigrate] = []
        prefills: list[PlannedPrefill] = []
        reservations: list[Reservation] = []
        if fresh or begun:
            migrates = allocate.consolidated(draft, decode.groups, times, long.homes)
            price = (self._line.weight + sum(c.weight for c in begun)) / len(view.instances)
            planner = PrefillPlanner(draft, times, allocate.allowance(draft, decode.groups, times), price, long)
            if planner.any_open:
                planner.plan(dispatch.admitted(draft, active, dispatch.in_order([*begun, *fresh]), places))
            prefills, reservations = planner.prefills, planner.reservations
        plan = _resolved(draft, decode.plan(), prefills, migrates, reservations)
        if not (fresh or begun or plan.evicts or plan.prepares):
            self._again.keep(view.version, decode.groups, plan.decodes, draft.lean)
        return plan


def _split(active: Sequence[RequestView]) -> tuple[list[RequestView], list[RequestView]]:
    """The active requests: those that may decode, and those that lack KV."""
    decoding: list[RequestView] = []
    lacking: list[RequestView] = []
    for request in active:
        if request.running:
            if request.issued < request.prompt_len + request.max_tokens:
                decoding.append(request)
        else:
            lacking.append(request)
    return decoding, lacking


def _resolved(
    draft: Draft,
    decodes: list[PlannedDecode],
    prefills: list[PlannedPrefill],
    migrates: list[PlannedMigrate],
    reservations: list[Reservation],
) -> Plan:
    """The plan, unless somebody must give pages back first."""
    stuck = tuple(PlannedEvict(request.request) for request in draft.stuck if request.in_flight == 0)
    if stuck:
        return Plan(evicts=stuck)
    if draft.blocked is not None:
        victim = draft.victim(draft.blocked)
        if victim is not None and victim.in_flight == 0:
            return Plan(evicts=(PlannedEvict(victim.request),), prepares=tuple(draft.prepares))
        if victim is not None:  # its steps must come back first
            decodes = _without(decodes, victim.request)
    if not (prefills or decodes or migrates or draft.prepares or reservations):
        return NOTHING
    only_decodes = bool(decodes) and not (prefills or migrates or draft.prepares)
    return Plan(
        migrates=tuple(migrates),
        prefills=tuple(prefills),
        decodes=tuple(decodes),
        prepares=tuple(draft.prepares),
        reservations=tuple(reservations),
        # Decodes that fill the queues of their instances leave the others as they were looked at.
        final=only_decodes and (draft.lean or not any(mask_of(decode.instances) & draft.idle for decode in decodes)),
    )


def _without(decodes: list[PlannedDecode], request: int) -> list[PlannedDecode]:
    out: list[PlannedDecode] = []
    for decode in decodes:
        rows = tuple(row for row in decode.rows if row.request != request)
        if rows:
            out.append(PlannedDecode(decode.instances, rows))
    return out
