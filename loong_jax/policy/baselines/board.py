"""One plan of a baseline under way: free pages, queues, READY programs, and what it asks for.

What it is: bookkeeping that all baselines share, and arithmetic over memory.
What it is not: a choice of who runs, or where.
"""

from __future__ import annotations

from collections.abc import Iterable

from loong_jax import buckets
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.groups import mask_of, members
from loong_jax.types import Phase, PlannedPrepare, Program, RequestView, View

Instances = tuple[int, ...]
Ready = frozenset[tuple[Program, Instances]]


class Buckets:
    """The largest READY program of each phase on each set of instances."""

    def __init__(self) -> None:
        self._ready: Ready | None = None
        self.largest: dict[tuple[Phase, Instances], int] = {}

    def refresh(self, ready: Ready) -> None:
        if ready is self._ready:
            return
        self._ready = ready
        self.largest = {}
        for program, instances in ready:
            key = (program.phase, instances)
            self.largest[key] = max(program.bucket, self.largest.get(key, 0))


class Board:
    """`free`: pages by instance, less as the plan grows; `queued`: steps by instance; `living`: bit mask."""

    def __init__(
        self, cluster: ClusterConfig, limits: LimitsConfig, ready: Buckets, view: View, cost: CostModel
    ) -> None:
        self.cluster, self.limits, self.view, self.cost = cluster, limits, view, cost
        self.free = [i.free_pages for i in view.instances]
        self.queued = [i.queued for i in view.instances]
        self.living = mask_of(i.instance for i in view.instances if i.alive)
        self.prepares: list[PlannedPrepare] = []
        self.unstarted: set[int] = set()  # requests that need a place to start
        self._ready = ready

    def bucket(self, phase: Phase, instances: Instances, size: int) -> int:
        """The largest READY program of `phase` on exactly `instances`; 0 when there is none. One for `size` tokens or
        rows of an instance is asked for, when the largest is smaller."""
        largest = self._ready.largest.get((phase, instances), 0)
        sizes = self.cluster.ladder.buckets(phase)
        if sizes and largest < size and largest < sizes[-1]:
            wanted = next((bucket for bucket in sizes if bucket >= size), sizes[-1])
            self.prepares.append(PlannedPrepare(Program(phase, len(instances), wanted), instances))
        return largest

    def idle(self, instances: Instances) -> bool:
        return all(self.queued[i] == 0 for i in instances)

    def spare(self, instances: Iterable[int]) -> int:
        return sum(self.free[i] for i in instances)

    def pages_needed(self, request: RequestView) -> int:
        """Pages it takes more than it gives back until its prompt is through: no more than the window's, where KV
        before that is dropped on the way."""
        page_tokens = self.cluster.page_tokens
        units = buckets.num_units(request.missing, page_tokens)
        if not self.cluster.kv_window:
            return units
        held = sum(resident.pages for resident in request.resident)
        return min(units, max(1, -(-self.cluster.kv_needed(request.known) // page_tokens) - held))

    def fits(self, request: RequestView, instances: Instances) -> bool:
        """Whether `instances`, empty, can hold it to its end."""
        kv_tokens = self.cluster.kv_needed(request.prompt_len + request.max_tokens - 1)
        return kv_tokens <= len(instances) * self.cluster.pages_per_instance * self.cluster.page_tokens


def future_pages(board: Board, requests: Iterable[RequestView]) -> int:
    """The most pages that `requests` hold at once, if each runs to `max_tokens` and all grow by a token a step: the
    request that ends last is at its longest when it ends, the others before it are shorter, and so on."""
    page_tokens = board.cluster.page_tokens
    lengths = [
        (r.prompt_len + r.max_tokens - r.known, board.cluster.kv_needed(r.known) + page_tokens - 1) for r in requests
    ]
    lengths.sort(reverse=True)
    most = now = 0
    for index, (left, tokens) in enumerate(lengths, start=1):
        now += tokens
        most = max(most, now + left * index)
    return -(-most // page_tokens)


def largest_group(cluster: ClusterConfig, allowed: int) -> Instances:
    """As many of `allowed` (a bit mask) as the ladder has a DoP for: neighbours, where there are so many; () for none.
    Programs are made for arcs of neighbours first."""
    n = cluster.num_instances
    dop = max((d for d in cluster.ladder.dops if d <= allowed.bit_count()), default=0)
    for first in range(n):
        arc = mask_of((first + k) % n for k in range(dop))
        if not arc & ~allowed:
            return members(arc)
    return members(allowed)[:dop]


def kv_mask(request: RequestView) -> int:
    """The instances that hold KV of it."""
    return mask_of(resident.instance for resident in request.resident)


def may_decode(request: RequestView) -> bool:
    return request.running and request.issued < request.prompt_len + request.max_tokens


def may_prefill(request: RequestView) -> bool:
    return not request.running and request.in_flight == 0
