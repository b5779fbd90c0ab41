"""All mutable state of the manager in one place: requests, instances, steps in flight, programs, the ledger.

What it is: plain fields and the few operations that keep them consistent.
What it is not: decisions (`policy/`), reactions to events (`manager.py`), or the making of commands (`issue.py`).
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.ledger import Ledger
from loong_jax.request_state import NO_SLOT, RequestState
from loong_jax.types import InstanceView, Phase, Program, Record, Reservation, Run

MAX_QUEUED_STEPS = 2
"""INV-6: one running and one queued step per instance."""

RECENT = 64
"""Prompts that tell how long the next ones will be."""

PRIOR_OUTPUT = 256
"""Generated tokens of a request, before any has ended."""


class Step(Record, frozen=True):
    """A step in flight. `samples`: (request, index of the token it samples) in the order of `StepDone.tokens`;
    `requests`: every request whose KV the step touches; `scored`: (request, runs) in the order of `StepDone.scores`."""

    step: int
    instances: tuple[int, ...]
    is_prefill: bool
    is_decode: bool
    samples: tuple[tuple[int, int], ...]
    requests: tuple[int, ...]
    scored: tuple[tuple[int, tuple[Run, ...]], ...] = ()


class CoreState:
    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig) -> None:
        self.cluster = cluster
        self.limits = limits
        self.ledger = Ledger(cluster)
        self.requests: dict[int, RequestState] = {}  # unfinished
        self.active: list[int] = []  # with a slot, in arrival order
        self.waiting: dict[int, None] = {}  # without, in arrival order
        self.held: dict[int, int] = {}  # waiting, but not to start before this parent has the KV they share
        self.free_slots = list(range(cluster.slots - 1, -1, -1))
        self.steps: dict[int, Step] = {}
        self.next_step = 0
        self.queued = [0] * cluster.num_instances
        self.prefilling = [0] * cluster.num_instances
        self.alive = [True] * cluster.num_instances
        # Instances that lost their pool: no step until those in flight came back and a Reset made a new one.
        self.blocked: set[int] = set()
        self.ready: frozenset[tuple[Program, tuple[int, ...]]] = frozenset()
        self.preparing: set[tuple[Program, tuple[int, ...]]] = set()
        # What `issue.py` found out: groups that the ladder knows, buckets that `buckets_of` has READY.
        self.groups: dict[tuple[int, ...], frozenset[int]] = {}
        self.buckets: dict[tuple[Phase, tuple[int, ...], int | None], int] = {}
        self.buckets_of = self.ready
        self.failures: dict[int, int] = {}  # request -> steps that failed since the last that did not
        self.reservations: dict[int, Reservation] = {}
        self.draining = False
        self.num_admitted = 0
        self.num_finished = 0
        self.num_ended = 0  # by themselves
        self.num_output = 0  # tokens of those
        self.recent: deque[int] = deque(maxlen=RECENT)  # lengths of prompts that came
        self.now_us = 0
        self.changes = 0
        self._waiting: tuple[RequestState, ...] | None = None
        self._usual_prompt = 0

    @property
    def version(self) -> int:
        """Changes with everything but ordinary decoding (`types.View`)."""
        return self.changes + self.ledger.changes

    # ---- instances

    def has_room(self, instance: int) -> bool:
        """May `instance` be given a step now?"""
        return self.queued[instance] < MAX_QUEUED_STEPS and self.alive[instance] and instance not in self.blocked

    def instance_views(self) -> tuple[InstanceView, ...]:
        ledger, blocked = self.ledger, self.blocked
        views = [
            InstanceView(
                i,
                ledger.free_pages(i),
                ledger.num_pages,
                MAX_QUEUED_STEPS if i in blocked else queued,
                self.prefilling[i],
                self.alive[i],
            )
            for i, queued in enumerate(self.queued)
        ]
        return tuple(views)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request may reach `num_tokens` of KV at all."""
        return self.cluster.kv_needed(num_tokens) <= self.capacity_tokens

    @property
    def mean_output(self) -> float:
        """Generated tokens of the requests that ended by themselves, on average; a guess counts as one of them."""
        return (PRIOR_OUTPUT + self.num_output) / (1 + self.num_ended)

    @property
    def usual_prompt(self) -> int:
        """The length that nine of ten recent prompts do not exceed."""
        if not self._usual_prompt and self.recent:
            self._usual_prompt = sorted(self.recent)[len(self.recent) * 9 // 10]
        return self._usual_prompt

    @property
    def capacity_tokens(self) -> int:
        """KV positions that the largest group of living instances can hold: no request may need more."""
        alive = sum(self.alive)
        dop = max((d for d in self.cluster.ladder.dops if d <= alive), default=0)
        return dop * self.cluster.pages_per_instance * self.cluster.page_tokens

    # ---- requests

    @property
    def free_places(self) -> int:
        """How many waiting requests may start now."""
        return min(self.limits.max_running - len(self.active), len(self.free_slots))

    def enqueue(self, request: RequestState) -> None:
        """A new request waits."""
        self.requests[request.id] = request
        self.waiting[request.id] = None
        self.recent.append(request.prompt_len)
        self._usual_prompt = 0
        self._waiting = None
        self.changes += 1

    def waiting_requests(self) -> tuple[RequestState, ...]:
        """Those that wait for a place, and for nothing else, in order of arrival."""
        if self._waiting is None:
            self._waiting = tuple(map(self.requests.__getitem__, self.waiting))
        if self.held:
            return tuple(request for request in self._waiting if request.id not in self.held)
        return self._waiting

    def start(self, request: RequestState) -> None:
        """A waiting request gets a slot."""
        del self.waiting[request.id]
        self._waiting = None
        self.changes += 1
        request.slot = self.free_slots.pop()
        insort(self.active, request.id)

    def remove(self, request: RequestState) -> None:
        """The request reached its end; its KV is already freed. Its slot may be reused at once: a step that still
        writes it was enqueued before any step of the next user."""
        del self.requests[request.id]
        self.changes += 1
        self.reservations.pop(request.id, None)
        self.failures.pop(request.id, None)
        if request.slot == NO_SLOT:
            del self.waiting[request.id]
            self._waiting = None
            self.held.pop(request.id, None)
        else:
            self.active.remove(request.id)
            self.free_slots.append(request.slot)
        self.num_finished += 1

    # ---- steps

    def open_step(
        self,
        instances: tuple[int, ...],
        samples: tuple[tuple[int, int], ...],
        requests: tuple[int, ...],
        *,
        is_prefill: bool = False,
        scored: tuple[tuple[int, tuple[Run, ...]], ...] = (),
    ) -> int:
        step = self.next_step
        self.next_step = step + 1
        is_decode = bool(samples) and not is_prefill
        self.steps[step] = Step(step, instances, is_prefill, is_decode, samples, requests, scored)
        self.changes += not is_decode
        for instance in instances:
            self.queued[instance] += 1
            self.prefilling[instance] += is_prefill
        for request in requests:
            self.requests[request].steps.append(step)
        return step

    def close_step(self, step: int) -> Step | None:
        """The step is done or lost; None when it is not in flight."""
        record = self.steps.pop(step, None)
        if record is None:
            return None
        self.changes += not record.is_decode
        for instance in record.instances:
            self.queued[instance] -= 1
            self.prefilling[instance] -= record.is_prefill
        for request in record.requests:
            state = self.requests.get(request)
            if state is not None:
                state.steps.remove(step)
        return record
