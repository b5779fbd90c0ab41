"""Baselines made of equal lanes: one group of everything, or each instance alone behind a balancer (LoongServe 7.3).

What it is: which lanes there are, whose request is whose, and the fast path of decoding.
What it is not: what a lane does with its requests (`lane.py`).

A request that no lane can hold to its end is served all the same, for the manager has admitted it: when it is the
oldest that waits, nothing else starts, and once every lane is empty it gets a lane of everything, for as long as it
lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.baselines.board import Board, Buckets, Instances, kv_mask, largest_group
from loong_jax.policy.baselines.lane import Lane, LanePlan, Rules
from loong_jax.policy.groups import mask_of, members
from loong_jax.types import Plan, PlannedDecode, PlannedEvict, PlannedPrefill, RequestView, View

Layout = Callable[[ClusterConfig, int], list[Instances]]
"""The groups of living instances (a bit mask) that are lanes."""

Balancer = Callable[[Board, Sequence[Instances], Sequence[Sequence[RequestView]], RequestView], int]
"""Which lane a fresh request is for: by lanes, their requests, and the request."""


def one_group(cluster: ClusterConfig, living: int) -> list[Instances]:
    return [largest_group(cluster, living)]


def each_alone(cluster: ClusterConfig, living: int) -> list[Instances]:
    return [(i,) for i in members(living)]


def round_robin(
    board: Board, lanes: Sequence[Instances], given: Sequence[Sequence[RequestView]], request: RequestView
) -> int:
    """In order of arrival, whatever they are: a proxy of 2024."""
    return request.request % len(lanes)


def least_work(
    board: Board, lanes: Sequence[Instances], given: Sequence[Sequence[RequestView]], request: RequestView
) -> int:
    """Where the least is left to compute, in tokens of prompts, of those with room for it; then the fewest pages."""

    def key(index: int) -> tuple[bool, int, int, int]:
        missing = [sum(run.count for run in r.missing) for r in given[index] if not r.running]
        spare = board.spare(lanes[index]) - sum(missing) // board.cluster.page_tokens
        return (spare < board.pages_needed(request), sum(missing), -spare, index)

    return min(range(len(lanes)), key=key)


def turn(
    holders: Sequence[RequestView], fresh: list[RequestView], fits: Callable[[RequestView], bool]
) -> tuple[bool, list[RequestView]]:
    """Whether all instances are one lane now, for requests that none of the others can hold, and who may start."""
    if not all(map(fits, holders)):
        return True, []
    first = next((k for k, request in enumerate(fresh) if not fits(request)), len(fresh))
    if first == 0 and fresh and not holders:
        return True, fresh[:1]
    return False, fresh[:first]


def evict_outside(holders: list[RequestView], instances: Iterable[int]) -> list[PlannedEvict]:
    """Those with KV elsewhere, after an instance was lost or came back, are computed again inside. They are taken out
    of `holders`; while a step of theirs is under way they wait."""
    covered = mask_of(instances)
    outside = [r for r in holders if kv_mask(r) & ~covered]
    for request in outside:
        holders.remove(request)
    return [PlannedEvict(r.request) for r in outside if r.in_flight == 0]


class LanePolicy:
    """One object per manager. It remembers the lanes of the living instances, and the decode each goes on with."""

    def __init__(
        self,
        cluster: ClusterConfig,
        limits: LimitsConfig,
        rules: Rules,
        layout: Layout = one_group,
        balancer: Balancer = round_robin,
    ) -> None:
        self.cluster, self.limits, self.rules = cluster, limits, rules
        self._layout, self._balancer = layout, balancer
        self._ready = Buckets()
        self._living = -1
        self._lanes: list[Lane] = []
        self._wide = Lane((), rules)

    def plan(self, view: View, cost: CostModel) -> Plan:
        decodes = self._again(view)
        if decodes is not None:
            return Plan(decodes=tuple(decodes))
        self._ready.refresh(view.ready)
        board = Board(self.cluster, self.limits, self._ready, view, cost)
        if board.living != self._living:
            self._living = board.living
            self._lanes = [Lane(instances, self.rules) for instances in self._layout(self.cluster, board.living)]
            self._wide = Lane(largest_group(self.cluster, board.living), self.rules)
        return self._plan(board) if board.living else Plan()

    def _again(self, view: View) -> list[PlannedDecode] | None:
        """Every lane that can take a step goes on decoding as before; None when one has to think."""
        decodes: list[PlannedDecode] = []
        for lane in self._lanes:
            if not (lane.busy(view) or lane.rests(view)):
                decode = lane.again(view)
                if decode is None:
                    return None
                decodes.append(decode)
        return decodes if decodes else None

    def _plan(self, board: Board) -> Plan:
        holders = [r for r in board.view.requests if r.resident or r.in_flight]
        fresh = [r for r in board.view.requests if not (r.resident or r.in_flight)]
        if len(self._lanes) > 1:
            size = self._lanes[0].instances
            wide, fresh = turn(holders, fresh, lambda r: len(r.resident) <= 1 and board.fits(r, size))
            if wide:
                stranded = evict_outside(holders, self._wide.instances)
                return self._join(board, [self._wide.plan(board, holders, fresh)], stranded)
        stranded = evict_outside(holders, [i for lane in self._lanes for i in lane.instances])
        lanes = [lane.instances for lane in self._lanes]
        given = self._given(board, lanes, holders)
        new = self._balanced(board, lanes, given, fresh)
        plans = [lane.plan(board, given[k], new[k]) for k, lane in enumerate(self._lanes) if not lane.busy(board.view)]
        return self._join(board, plans, stranded)

    def _given(
        self, board: Board, lanes: Sequence[Instances], holders: Sequence[RequestView]
    ) -> list[list[RequestView]]:
        if len(lanes) == 1:
            return [list(holders)]
        lane_of = {i: index for index, lane in enumerate(lanes) for i in lane}
        given: list[list[RequestView]] = [[] for _ in lanes]
        for request in holders:
            if request.resident:
                given[lane_of[request.resident[0].instance]].append(request)
        return given

    def _balanced(
        self,
        board: Board,
        lanes: Sequence[Instances],
        given: Sequence[Sequence[RequestView]],
        fresh: Sequence[RequestView],
    ) -> list[list[RequestView]]:
        if len(lanes) == 1:
            return [list(fresh)]
        load = [list(requests) for requests in given]
        new: list[list[RequestView]] = [[] for _ in lanes]
        for request in fresh:
            index = self._balancer(board, lanes, load, request)
            new[index].append(request)
            load[index].append(request)
        return new

    def _join(self, board: Board, plans: Sequence[LanePlan], stranded: list[PlannedEvict]) -> Plan:
        evicts = (*stranded, *(plan.evict for plan in plans if plan.evict is not None))
        prefills: list[PlannedPrefill] = [plan.prefill for plan in plans if plan.prefill is not None]
        decodes: list[PlannedDecode] = [plan.decode for plan in plans if plan.decode is not None]
        return Plan(evicts, (), tuple(prefills), tuple(decodes), tuple(board.prepares))
