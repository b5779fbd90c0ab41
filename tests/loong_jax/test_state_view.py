"""What a policy sees: live, in order, and of one version as long as nothing but decoding goes on."""

from __future__ import annotations

import msgspec
import pytest

from loong_jax.config import LimitsConfig
from loong_jax.types import (
    Aborted,
    Adjustment,
    Arrived,
    CostUpdated,
    InstanceJoined,
    InstanceLost,
    PlannedEvict,
    PlannedMigrate,
    Program,
    ProgramReady,
    Rehome,
    Run,
    Share,
    StepFailed,
)
from tests.support.bench import CLUSTER, Bench


@pytest.fixture
def bench() -> Bench:
    """Request 1 decodes on instance 0, request 2 waits."""
    bench = Bench(CLUSTER, msgspec.structs.replace(LimitsConfig(), max_running=2))
    bench.running(1, 6)
    bench.arrive(2, 4)
    return bench


def version(bench: Bench) -> int:
    return bench.manager.view().version


def test_waiting_requests_are_shown_beyond_those_that_may_start(bench: Bench) -> None:
    bench.arrive(3, 4)
    view = bench.manager.view()
    assert [r.request for r in view.active] == [1]
    assert [r.request for r in view.waiting] == [2, 3]
    assert view.free_places == 1
    assert [r.request for r in view.requests] == [1, 2]


def test_decoding_within_and_beyond_a_page_is_no_change(bench: Bench) -> None:
    before = version(bench)
    request = bench.view(1)
    for _ in range(6):  # pages of four: new ones too
        bench.done(bench.decode((0,), (1, 0)), 5)
    assert version(bench) == before
    assert request.known == 13, "the view is live"


def test_a_new_instance_of_a_row_is_a_change(bench: Bench) -> None:
    before = version(bench)
    bench.decode((0, 1), (1, 1))
    assert version(bench) > before


def test_a_row_at_its_end_is_a_change(bench: Bench) -> None:
    bench.running(3, 4, max_tokens=3)
    before = version(bench)
    bench.decode((0,), (3, 0))
    assert version(bench) == before
    bench.decode((0,), (3, 0))
    assert version(bench) > before, "no token is left to sample"


def test_a_row_in_another_group_is_a_change(bench: Bench) -> None:
    bench.done(bench.decode((0, 1), (1, 0)), 5)
    before = version(bench)
    bench.done(bench.decode((0, 1), (1, 0)), 5)
    assert version(bench) == before
    bench.decode((0,), (1, 0))
    assert version(bench) > before


def test_a_row_that_waits_for_its_token_is_a_change(bench: Bench) -> None:
    bench.handle(Aborted(1))
    bench.running(3, 4, adjustment=Adjustment(presence_penalty=1.0))
    before = version(bench)
    step = bench.decode((0,), (3, 0))
    assert not bench.view(3).running
    assert version(bench) > before
    before = version(bench)
    bench.done(step, 5)
    assert bench.view(3).running
    assert version(bench) > before


def _fail_a_step(bench: Bench) -> None:
    step = bench.decode((0,), (1, 0))
    bench.handle(StepFailed(step.step, (0,), "test"))


def _prefill(bench: Bench) -> None:
    bench.prefill(2, (1,), [Run(0, 4)], [Share(1, 1)])


def _migrate(bench: Bench) -> None:
    bench.handle(Aborted(2), migrates=(PlannedMigrate(Rehome(1, 0, 1, 1)),))


EVENTS = {
    "arrival": lambda bench: bench.handle(Arrived(9, b"\1\0\0\0", 4)),
    "abort": lambda bench: bench.handle(Aborted(2)),
    "prefill": _prefill,
    "migration": _migrate,
    "eviction": lambda bench: bench.handle(Aborted(7), evicts=(PlannedEvict(1),)),
    "failure": _fail_a_step,
    "loss": lambda bench: bench.handle(InstanceLost(3)),
    "cost": lambda bench: bench.handle(CostUpdated({})),
    "program": lambda bench: bench.handle(ProgramReady(Program("decode", 1, 64), (0,))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("event", EVENTS)
def test_everything_else_is_a_change(bench: Bench, event: str) -> None:
    before = version(bench)
    EVENTS[event](bench)
    assert version(bench) > before


def test_the_end_of_a_prefill_and_a_return_are_changes(bench: Bench) -> None:
    step = bench.prefill(2, (1,), [Run(0, 4)], [Share(1, 1)])
    before = version(bench)
    bench.done(step, 7)
    assert version(bench) > before
    assert bench.view(2).first_token_us == bench.now_us
    bench.handle(InstanceLost(3))
    before = version(bench)
    bench.handle(InstanceJoined(3))
    assert version(bench) > before
