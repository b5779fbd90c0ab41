"""One plan under way: what is left to hand out, and what the plan found missing.

What it is: bookkeeping shared by the parts of the elastic policy, and the choice of whom to evict.
What it is not: a choice of who runs, or where (`scale.py`, `prefill.py`).
"""

from __future__ import annotations

from loong_jax import buckets
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.groups import ReadyGroups, mask_of
from loong_jax.types import Phase, PlannedPrepare, RequestView, View

MAX_QUEUED_STEPS = 2


class Draft:
    """`free`: pages by instance; `room`: living instances that can take a step, `idle` those without any; `taken`:
    instances planned; `held`: reserved for a prefill that needs them together, and keeping room for it; `load`: decode
    rows by instance; `stall`: what a second's wait costs them; `lean`: decode groups queue no second step. They change
    as the plan grows."""

    def __init__(
        self, cluster: ClusterConfig, limits: LimitsConfig, ready: ReadyGroups, view: View, cost: CostModel
    ) -> None:
        self.cluster, self.limits, self.ready, self.view, self.cost = cluster, limits, ready, view, cost
        self.free = {i.instance: i.free_pages for i in view.instances}
        self.alive = self.room = self.idle = self.held = 0
        for instance in view.instances:
            if instance.alive:
                self.alive |= 1 << instance.instance
                if instance.queued < MAX_QUEUED_STEPS:
                    self.room |= 1 << instance.instance
                if instance.queued == 0:
                    self.idle |= 1 << instance.instance
        self.taken = 0
        self.lean = False
        self.load = [0] * len(view.instances)
        self.stall = [0.0] * len(view.instances)
        self.prepares: list[PlannedPrepare] = []
        self.blocked: RequestView | None = None  # the oldest request that lacks pages
        self.stuck: list[RequestView] = []  # no group can span their KV: an instance was lost

    def block(self, request: RequestView) -> None:
        if self.blocked is None or request.request < self.blocked.request:
            self.blocked = request

    def pages_needed(self, request: RequestView) -> int:
        """Pages it takes more than it gives back until its prompt is through: no more than the window's, where KV
        before that is dropped on the way."""
        page_tokens, window = self.cluster.page_tokens, self.cluster.kv_window
        units = buckets.num_units(request.missing, page_tokens)
        if not window:
            return units
        held = sum(resident.pages for resident in request.resident)
        return min(units, max(1, -(-self.cluster.kv_needed(request.known) // page_tokens) - held))

    def want(self, phase: Phase, need: int, size: int, least_dop: int = 1) -> bool:
        """Ask for a program of `size` rows or tokens, on the smallest set (of `least_dop` or more) that covers `need`.
        False when there is nothing to ask for: it is READY, or no group of the ladder can cover `need`."""
        sizes = self.cluster.ladder.buckets(phase)
        bucket = next((b for b in sizes if b >= size), sizes[-1])
        prepare = self.ready.wanted(phase, need, self.alive, bucket, self.cluster, least_dop)
        if prepare is not None:
            self.prepares.append(prepare)
        return prepare is not None

    def victim(self, blocked: RequestView) -> RequestView | None:
        """The newest holder of KV within reach that is newer than `blocked`; itself, if it is the only holder there."""
        need = mask_of(blocked.kv)
        phase = Phase.DECODE if blocked.running else blocked.prefill_phase
        reach = self.ready.reach(phase, need, self.alive)
        holders = [request for request in self.view.active if any(reach >> i & 1 for i in request.kv)]
        if not holders:
            return None
        newest = holders[-1]
        return newest if newest.request > blocked.request or len(holders) == 1 and newest is blocked else None
