"""A rule that a plan breaks is named before anything changes. Plans that keep the rules: `test_manager.py`."""

from array import array

import pytest

from loong_jax import issue
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.core_state import CoreState
from loong_jax.invariants import check_state
from loong_jax.issue import PlanError
from loong_jax.request_state import RequestState
from loong_jax.types import (
    ContextForm,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedEvict,
    PlannedMigrate,
    PlannedPrefill,
    PlannedPrefillRow,
    Rehome,
    Run,
    Sampling,
    Share,
)
from tests.support.schedules import arcs

CLUSTER = ClusterConfig(8, pages_per_instance=3)
RING, GATHER = ContextForm.RING, ContextForm.GATHER_Q


@pytest.fixture
def state() -> CoreState:
    """Request 0: 20 tokens, prefilled on instance 0, ready to decode. Request 1: 40 tokens, waiting."""
    state = CoreState(CLUSTER, LimitsConfig())
    state.ready = frozenset(arcs(CLUSTER))
    for i, length in enumerate((20, 40)):
        state.enqueue(RequestState(state.ledger, i, 0, array("i", range(length)).tobytes(), 8, Sampling(), ()))
        state.num_admitted += 1
    command = issue.prefill(state, prefill((0,), [(0, Run(0, 20))], [(0, 2)]))
    assert command.rows[0].emit
    state.requests[0].tokens.append(3)
    state.close_step(command.step)
    check_state(state)
    return state


def prefill(instances, rows, keep, form=RING, rehome=()) -> PlannedPrefill:
    return PlannedPrefill(
        instances,
        form,
        tuple(PlannedPrefillRow(request, (run,)) for request, run in rows),
        tuple(Share(*share) for share in keep),
        tuple(Rehome(*one) for one in rehome),
    )


def decode(instances, *rows) -> PlannedDecode:
    return PlannedDecode(instances, tuple(PlannedDecodeRow(*row) for row in rows))


ALL = Run(0, 40)


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        (prefill((1, 0), [(1, ALL)], [(0, 3)]), "sorted and unique"),
        (prefill((0, 1, 2, 3, 4), [(1, ALL)], [(1, 3)]), "no DoP of the ladder"),
        (prefill((0, 2), [(1, ALL)], [(2, 3)]), "no READY"),
        (prefill((1,), [], []), "number of rows"),
        (prefill((1,), [(9, ALL)], [(1, 3)]), "not live"),
        (prefill((1,), [(1, Run(0, 0))], []), "empty runs"),
        (prefill((1,), [(1, Run(16, 16))], [(1, 1)]), "not the first missing"),
        (prefill((1,), [(1, ALL), (1, ALL)], [(1, 6)]), "a request twice"),
        (prefill((1,), [(1, ALL)], [(1, 2)]), "does not cover"),
        (prefill((1,), [(1, ALL)], [(2, 3)]), "bad share"),
        (prefill((0, 1), [(1, ALL)], [(0, 3)]), "INV-10"),
        (prefill((1,), [(0, Run(20, 1))], [(1, 1)]), "KV outside the group"),
        (prefill((0, 1), [(0, Run(20, 1))], [(1, 1)], GATHER, [(0, 0, 1, 1)]), "only the ring"),
        (prefill((0, 1), [(0, Run(20, 1))], [(1, 1)], RING, [(0, 0, 1, 3)]), "no such pages"),
        (decode((0,)), "no rows"),
        (decode((0,), (9, 0)), "no live request"),
        (decode((0,), (1, 0)), "lacks KV"),
        (decode((0,), (0, 0), (0, 0)), "there twice"),
        (decode((0, 1), (0, 2)), "master is not in the group"),
        (decode((1, 2), (0, 1)), "KV outside the group"),
        (PlannedMigrate(Rehome(0, 0, 1, 9)), "no such pages"),
        (PlannedMigrate(Rehome(1, 0, 1, 1)), "no such pages"),
        (PlannedEvict(1), "holds no KV"),
        (PlannedEvict(9), "not live"),
    ],
)
def test_a_broken_rule_is_named(state: CoreState, plan, rule: str):
    with pytest.raises(PlanError, match=rule):
        perform(state, plan)


def perform(state: CoreState, plan) -> object:
    match plan:
        case PlannedPrefill():
            return issue.prefill(state, plan)
        case PlannedDecode():
            return issue.decode(state, plan)
        case PlannedMigrate():
            return issue.migrate(state, plan)
        case _:
            return issue.evict(state, plan)


def test_a_third_step_of_an_instance_is_refused(state: CoreState):
    for _ in range(2):
        perform(state, decode((0,), (0, 0)))
    with pytest.raises(PlanError, match="INV-6"):
        perform(state, decode((0,), (0, 0)))
    check_state(state)


def test_a_request_in_flight_is_not_evicted(state: CoreState):
    perform(state, decode((0, 1), (0, 1)))
    with pytest.raises(PlanError, match="in flight"):
        perform(state, PlannedEvict(0))


def test_a_token_only_its_samplers_hold_is_fed_by_one_of_them(state: CoreState):
    perform(state, decode((0, 1), (0, 0)))
    with pytest.raises(PlanError, match="did not sample the newest"):
        perform(state, decode((0, 1, 2), (0, 2)))
    command = issue.decode(state, decode((0, 1), (0, 1)))
    assert command.rows[0].token == -1
