"""Prefill and decode on instances of their own: DistServe (LoongServe section 7.3).

What it is: the first half of the living instances is a lane that computes prompts, the other half one that decodes. A
request whose prompt is through moves over by migration, as soon as the decoding half has room for it; until then it
stays where it is, and takes room from prompts to come.
What it is not: a choice of the split: it is fixed, which is the point.

A migration is a step of both instances here, not a transfer beside their steps. So it is planned when the source has
nothing to do, before its next prompt, and in the second place of the destination's queue, behind a decode: rows wait
for one command's pages at a time. The KV of a request that must be completed again (it was evicted, or lost in part) is
dropped where it is not on the first half. What neither half can hold gets all instances (`lanes.turn`).
"""

from __future__ import annotations

from loong_jax.config import ClusterConfig, ConfigError, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.baselines.board import Board, Buckets, kv_mask, largest_group, may_decode
from loong_jax.policy.baselines.lane import Lane, LanePlan, Rules
from loong_jax.policy.baselines.lanes import evict_outside, turn
from loong_jax.policy.groups import mask_of, members
from loong_jax.types import Phase, Plan, PlannedEvict, PlannedMigrate, Rehome, RequestView, View


class Disaggregated:
    """One object per manager. It remembers the halves, and the decode that goes on. Raises ConfigError for a cluster
    that cannot be parted, or has no migration."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig, prefill: Rules, decode: Rules) -> None:
        if cluster.num_instances < 2 or 2 not in cluster.ladder.dops:
            raise ConfigError("dops: disaggregation needs two instances, and DoP 2 for migrations between them")
        self.cluster, self.limits = cluster, limits
        self._rules = (prefill._replace(decodes=False), decode)
        self._ready = Buckets()
        self._living = -1
        self._quiet = -1  # the version of the view at which there was nothing to do but to decode
        self._split(0)

    def _split(self, living: int) -> None:
        alive = members(living)
        half = len(alive) // 2
        groups = [largest_group(self.cluster, mask_of(part)) for part in (alive[:half], alive[half:])]
        self._prefill, self._decode = (Lane(group, rules) for group, rules in zip(groups, self._rules, strict=True))
        self._wide = Lane(largest_group(self.cluster, living), self._rules[1])
        self._living = living

    def plan(self, view: View, cost: CostModel) -> Plan:
        if view.version == self._quiet:
            decode = self._decode.again(view)
            if decode is not None:
                return Plan(decodes=(decode,))
        self._quiet = -1
        self._ready.refresh(view.ready)
        board = Board(self.cluster, self.limits, self._ready, view, cost)
        if board.living != self._living:
            self._split(board.living)
        if not board.living:
            return Plan()
        holders = [r for r in view.requests if r.resident or r.in_flight]
        fresh = [r for r in view.requests if not (r.resident or r.in_flight)]
        halves = (self._prefill.instances, self._decode.instances)
        wide, fresh = turn(holders, fresh, lambda r: all(half and board.fits(r, half) for half in halves))
        if wide:
            evicts = evict_outside(holders, self._wide.instances)
            return _join(board, [self._wide.plan(board, holders, fresh)], [], evicts)
        return self._plan(board, holders, fresh)

    def _plan(self, board: Board, holders: list[RequestView], fresh: list[RequestView]) -> Plan:
        prefill, decode = self._prefill, self._decode
        evicts = evict_outside(holders, (*prefill.instances, *decode.instances))
        second = mask_of(decode.instances)
        here: list[RequestView] = []  # with prompts to compute, or to be moved
        there: list[RequestView] = []
        moving: list[RequestView] = []
        for request in holders:
            held = kv_mask(request)
            if held and not held & ~second and (request.running or request.in_flight):
                there.append(request)
            elif request.running:
                here.append(request)
                if may_decode(request):
                    moving.append(request)
            elif not held & second:
                here.append(request)
            elif request.in_flight == 0:
                evicts.append(PlannedEvict(request.request))
        if evicts:
            return _join(board, [], [], evicts)
        completed, moving = moving, self._with_room(board, moving, there)
        plans = [decode.plan(board, there, [])]
        taken = mask_of(decode.instances) if plans[0].decode is not None else 0
        migrates = self._migrates(board, moving, taken)
        if moving and not migrates and plans[0] == LanePlan() and not any(board.queued):
            evicts = self._in_the_way(completed)
        if not moving:
            plans.append(prefill.plan(board, here, fresh))
            if plans[-1] == LanePlan() and not prefill.busy(board.view):
                self._quiet = board.view.version
        return _join(board, plans, migrates, evicts)

    def _with_room(self, board: Board, moving: list[RequestView], there: list[RequestView]) -> list[RequestView]:
        """In order of arrival, those that the second half has room for; first those that are partly there."""
        second = mask_of(self._decode.instances)
        left = board.spare(self._decode.instances) - sum(1 for r in there if may_decode(r) and r.open_page is None)
        out: list[RequestView] = []
        for request in sorted(moving, key=lambda r: (not kv_mask(r) & second, r.request)):
            pages = sum(x.pages for x in request.resident if not second >> x.instance & 1)
            if left < pages + board.limits.decode_headroom_pages and (there or out):
                break
            left -= pages
            out.append(request)
        return out

    def _in_the_way(self, completed: list[RequestView]) -> list[PlannedEvict]:
        """Nothing goes on, for the second half is full of requests that are partly there, as all instances together
        have left them: the last one gives way."""
        second = mask_of(self._decode.instances)
        last = max((r for r in completed if kv_mask(r) & second), key=lambda r: r.request, default=None)
        return [] if last is None else [PlannedEvict(last.request)]

    def _migrates(self, board: Board, moving: list[RequestView], taken: int) -> list[PlannedMigrate]:
        """From sources with nothing to do, each to the destination with the most free pages."""
        out: list[PlannedMigrate] = []
        second = mask_of(self._decode.instances)
        for request in moving:
            for held in request.resident:
                if (second | taken) >> held.instance & 1 or board.queued[held.instance]:
                    continue
                targets = [
                    i
                    for i in self._decode.instances
                    if not taken >> i & 1
                    and board.queued[i] < 2
                    and board.free[i]
                    and board.bucket(Phase.MIGRATE, _pair(held.instance, i), self.cluster.ladder.move_pages)
                ]
                if not targets:
                    continue
                target = max(targets, key=lambda i: (board.free[i], -i))
                pages = min(held.pages, board.free[target])
                out.append(PlannedMigrate(Rehome(request.request, held.instance, target, pages)))
                board.free[target] -= pages
                taken |= 1 << target | 1 << held.instance
        return out


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def _join(board: Board, plans: list[LanePlan], migrates: list[PlannedMigrate], evicts: list[PlannedEvict]) -> Plan:
    return Plan(
        (*evicts, *(plan.evict for plan in plans if plan.evict is not None)),
        tuple(migrates),
        tuple(plan.prefill for plan in plans if plan.prefill is not None),
        tuple(plan.decode for plan in plans if plan.decode is not None),
        tuple(board.prepares),
    )
