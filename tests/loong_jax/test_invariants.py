"""Each invariant can fail, and says which it is."""

from array import array
from collections.abc import Callable

import pytest

from loong_jax import invariants
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.ledger import InvariantError
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.types import Arrived, ProgramReady, RunPrefill, Sampling, StepDone
from tests.support.schedules import arcs


def running() -> Manager:
    """One request in decode, two steps in flight; one that waits for a place."""
    cluster, limits = ClusterConfig(8), LimitsConfig(max_running=1)
    manager = Manager(cluster, limits, Elastic(cluster, limits), unmeasured())
    for program, instances in arcs(cluster):
        manager.handle(ProgramReady(program, instances), 0)
    prefill = None
    for request in range(2):
        commands = manager.handle(Arrived(request, array("i", range(40)).tobytes(), 9, Sampling(), ()), 1)
        prefill = prefill or next(c for c in commands if isinstance(c, RunPrefill))
    assert prefill is not None
    manager.handle(StepDone(prefill.step, (5,), (0.0,)), 2)
    manager.check()
    return manager


def lose_request(m: Manager) -> None:
    m.state.num_admitted += 1


def forget_waiting(m: Manager) -> None:
    m.state.waiting.clear()


def leak_slot(m: Manager) -> None:
    m.state.free_slots.pop()


def leak_page(m: Manager) -> None:
    m.state.ledger.reserve(6, 1)


def lie_about_queue(m: Manager) -> None:
    m.state.queued[7] += 1


def lie_about_steps(m: Manager) -> None:
    m.state.requests[0].steps.append(99)


def lie_about_holes(m: Manager) -> None:
    m.state.requests[0].holes = m.state.requests[1].holes


def stop_everything(m: Manager) -> None:
    for step in list(m.state.steps):
        m.state.close_step(step)
    request = m.state.requests[0]
    request.issued = request.known
    m.state.ledger.truncate(0, request.known - 1)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lose_request, "INV-1"),
        (forget_waiting, "INV-2"),
        (leak_slot, "INV-2"),
        (leak_page, "INV-4"),
        (lie_about_holes, "INV-5"),
        (lie_about_queue, "INV-6"),
        (lie_about_steps, "INV-6"),
        (stop_everything, "INV-8"),
    ],
)
def test_damage_is_named(damage: Callable[[Manager], None], name: str):
    manager = running()
    damage(manager)
    with pytest.raises(InvariantError, match=name):
        manager.check()


def test_the_state_as_text():
    text = invariants.describe(running().state)
    assert len(text.splitlines()) == 1 + 8 + 2
    assert "request 0 decode" in text
    assert "request 1 waiting" in text
