"""The first elastic policy: simple, honest, and able to serve whatever the pool can hold (DESIGN 4).

Dispatch in order of arrival; DoP by predicted time; chunked prefill that leaves room for decodes; scale down to the
fewest instances at a prompt's end; masters by rows; one instance more when memory is short; evict and recompute the
newest when nothing else helps. What it is not: the four-step policy of the paper, which weighs gain against cost.

Progress. Let r be the oldest request that holds KV. If r lacks a page, newer holders are evicted until it has one; if
it holds all KV alone and still lacks one, its pages are fragmented, and it is recomputed into whole pages. So r ends,
and so does every request after it.
"""

from __future__ import annotations

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import ReadyGroups
from loong_jax.policy.simple_decode import DecodePlanner
from loong_jax.policy.simple_prefill import PrefillPlanner
from loong_jax.types import Plan, PlannedDecode, PlannedEvict, Program, RequestView, View

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
        return _plan(Draft(self.cluster, self.limits, self._groups, view, cost))


def _plan(draft: Draft) -> Plan:
    if not draft.room:
        return _EMPTY
    decoding: list[RequestView] = []
    prefilling: list[RequestView] = []
    for request in draft.view.requests:
        if request.running:
            if request.issued < request.prompt_len + request.max_tokens:
                decoding.append(request)
        elif request.in_flight == 0:
            prefilling.append(request)
    decode = DecodePlanner(draft, decoding)  # first: where rows decode sways where prompts go
    prefills, reservations = PrefillPlanner(draft, decode.mask).plan(prefilling) if prefilling else ([], [])
    decodes = decode.plan()
    stuck = tuple(PlannedEvict(request.request) for request in draft.stuck if request.in_flight == 0)
    if stuck:
        return Plan(evicts=stuck)
    if draft.blocked is not None:
        victim = draft.victim(draft.blocked)
        if victim is not None and victim.in_flight == 0:
            return Plan(evicts=(PlannedEvict(victim.request),), prepares=tuple(draft.prepares))
        if victim is not None:  # its steps must come back first
            decodes = _without(decodes, victim.request)
    if not (prefills or decodes or draft.prepares or reservations):
        return _EMPTY
    return Plan(
        prefills=tuple(prefills),
        decodes=tuple(decodes),
        prepares=tuple(draft.prepares),
        reservations=tuple(reservations),
    )


def _without(decodes: list[PlannedDecode], request: int) -> list[PlannedDecode]:
    out: list[PlannedDecode] = []
    for decode in decodes:
        rows = tuple(row for row in decode.rows if row.request != request)
        if rows:
            out.append(PlannedDecode(decode.instances, rows))
    return out
