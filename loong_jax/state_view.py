"""What a policy sees of the manager's state: `types.View`, live and read only (floor 2's side of the seam).

What it is: one object per plan, over the state itself. Nothing is copied but lists of references, and those only when
read: a policy that goes on as before pays nothing for the number of requests.
What it is not: a snapshot. It holds until an event or a plan changes the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from loong_jax.core_state import CoreState
from loong_jax.types import InstanceView, Program, RequestView


class StateView:
    __slots__ = ("_instances", "_requests", "_state")

    def __init__(self, state: CoreState) -> None:
        self._state = state
        self._instances: tuple[InstanceView, ...] | None = None
        self._requests: tuple[RequestView, ...] | None = None

    @property
    def now_us(self) -> int:
        return self._state.now_us

    @property
    def version(self) -> int:
        return self._state.version

    @property
    def page_tokens(self) -> int:
        return self._state.ledger.page_tokens

    @property
    def instances(self) -> tuple[InstanceView, ...]:
        if self._instances is None:
            self._instances = self._state.instance_views()
        return self._instances

    @property
    def free_places(self) -> int:
        return max(0, self._state.free_places)

    @property
    def mean_output(self) -> float:
        return self._state.mean_output

    @property
    def usual_prompt(self) -> int:
        return self._state.usual_prompt

    @property
    def active(self) -> Sequence[RequestView]:
        requests = self._state.requests
        return [requests[r] for r in self._state.active]

    @property
    def waiting(self) -> Sequence[RequestView]:
        return self._state.waiting_requests()

    @property
    def requests(self) -> Sequence[RequestView]:
        if self._requests is None:
            may_start = islice(self.waiting, self.free_places) if self._state.waiting else ()
            self._requests = (*self.active, *may_start)
        return self._requests

    @property
    def ready(self) -> frozenset[tuple[Program, tuple[int, ...]]]:
        return self._state.ready
