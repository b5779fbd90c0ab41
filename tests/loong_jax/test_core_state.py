"""Requests, slots and steps in flight stay consistent whatever comes and goes."""

from array import array

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.core_state import CoreState
from loong_jax.request_state import NO_SLOT, RequestState
from loong_jax.types import Sampling


def state_of(num_requests: int, **limits: int) -> CoreState:
    state = CoreState(ClusterConfig(8, slots=3), LimitsConfig(**limits))
    for i in range(num_requests):
        state.enqueue(RequestState(state.ledger, i, 0, array("i", [1, 2]).tobytes(), 1, Sampling(), ()))
    return state


def test_slots_and_places_come_back():
    state = state_of(4, max_running=2)
    assert state.free_places == 2
    state.start(state.requests[2])
    state.start(state.requests[0])
    assert (state.active, list(state.waiting), state.free_places) == ([0, 2], [1, 3], 0), "in order of arrival"
    slot = state.requests[2].slot
    state.remove(state.requests[2])
    assert (state.active, state.free_places, state.num_finished) == ([0], 1, 1)
    state.start(state.requests[1])
    assert state.requests[1].slot == slot
    state.remove(state.requests[3])
    assert list(state.waiting) == []
    assert all(r.slot != NO_SLOT for r in state.requests.values())


def test_slots_bound_what_runs():
    state = state_of(4, max_running=100)
    assert state.free_places == 3


def test_a_step_holds_its_instances_until_it_is_closed():
    state = state_of(1)
    first = state.open_step((1, 2), ((0, 2),), (0,), is_prefill=True)
    second = state.open_step((2,), (), (0,))
    assert [state.has_room(i) for i in (0, 1, 2)] == [True, True, False]
    assert (state.prefilling[1], state.queued[2], state.requests[0].steps) == (1, 2, [first, second])
    step = state.close_step(first)
    assert step is not None
    assert step.samples == ((0, 2),)
    assert state.close_step(first) is None, "a step ends once"
    assert state.has_room(2)
    state.remove(state.requests[0])
    assert state.close_step(second) is not None, "its request may be gone"
    assert not any(state.queued)
    assert not any(state.prefilling)


def test_capacity_is_that_of_the_largest_group_of_living_instances():
    state = state_of(0)
    per_instance = state.cluster.pages_per_instance * state.cluster.page_tokens
    assert state.capacity_tokens == 8 * per_instance
    state.alive[3] = False
    assert state.capacity_tokens == 4 * per_instance, "seven live, and no group has five to seven"
    assert not state.has_room(3)


def test_a_blocked_instance_takes_no_step_and_looks_full():
    state = state_of(0)
    state.blocked.add(5)
    assert not state.has_room(5)
    assert state.instance_views()[5].queued == 2
    assert state.instance_views()[4].queued == 0
