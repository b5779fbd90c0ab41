"""The manager with plans given by hand: lifecycles, rules, late ends, forks and failures, one by one."""

from __future__ import annotations

from array import array

import msgspec
import numpy as np
import pytest

from loong_jax.config import LimitsConfig
from loong_jax.issue import PlanError
from loong_jax.ledger import InvariantError
from loong_jax.types import (
    Aborted,
    Adjust,
    Adjustment,
    AnyCommand,
    Arrived,
    ContextForm,
    CostUpdated,
    Drain,
    Emit,
    EmitScores,
    Finish,
    FinishReason,
    Forget,
    Free,
    InstanceJoined,
    InstanceLost,
    Migrate,
    Phase,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedEvict,
    PlannedMigrate,
    PlannedPrefill,
    PlannedPrefillRow,
    PlannedPrepare,
    Prepare,
    Program,
    ProgramReady,
    Rehome,
    Reject,
    RejectReason,
    RequestFailed,
    RequestView,
    Reservation,
    Reset,
    Run,
    RunPrefill,
    Sampling,
    Scores,
    Share,
    StepDone,
    StepFailed,
    Stopped,
    Tick,
    Top,
)
from tests.support.bench import CLUSTER, FIRST, LADDER, ONE_PAGE, RING, Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---- lifecycle


def test_a_life(bench: Bench) -> None:
    bench.arrive(1, 10, max_tokens=3, sampling=Sampling(seed=5))
    prefill = bench.prefill(1, (0, 1), [Run(0, 10)], [Share(0, 2), Share(1, 1)])
    (row,) = prefill.rows
    assert (prefill.bucket, row.emit, row.homes) == (16, True, (0, 0, 1))
    assert row.tokens == array("i", range(100, 110)).tobytes()
    first = bench.decode((0, 1), (1, 1)).rows[0]  # one step late: the device has token 10
    assert (first.position, first.token, first.page, first.run) == (10, -1, row.pages[2], Run(8, 3))
    assert bench.done(prefill, 50) == [Emit(1, 0, (50,), (-0.5,), 2)]
    second = bench.decode((0, 1), (1, 0)).rows[0]  # another master: a page of its own
    assert (second.position, second.token, second.run) == (11, -1, Run(11, 1))
    assert bench.handle(StepDone(1, (51,), (-1.0,))) == [Emit(1, 1, (51,), (-1.0,), 2)]
    out = bench.handle(StepDone(2, (52,), (-1.0,)))
    assert out == [Emit(1, 2, (52,), (-1.0,), 2), Finish(1, FinishReason.LENGTH, 3), Free(1, (0, 1))]
    assert bench.free_pages() == [8, 8, 8, 8]
    bench.check()


def test_host_feeds_the_token_once_it_is_known(bench: Bench) -> None:
    bench.running(1, 4)
    assert bench.decode((0,), (1, 0)).rows[0].token == 7


def test_stop_id_ends_with_the_next_step_in_flight(bench: Bench) -> None:
    """The step in flight still writes the freed page; its token is thrown away."""
    bench.running(1, 4, stop_ids=(9,))
    steps = [bench.decode((0,), (1, 0)), bench.decode((0,), (1, 0))]
    out = bench.done(steps[0], 9)
    assert out == [Emit(1, 1, (9,), (-0.5,), 1), Finish(1, FinishReason.STOP, 2), Free(1, (0,))]
    assert bench.done(steps[1], 3) == []
    bench.check()


def test_text_stop_and_abort(bench: Bench) -> None:
    bench.running(1, 4)
    bench.running(2, 4)
    assert bench.handle(Stopped(1, 1)) == [Finish(1, FinishReason.STOP, 1), Free(1, (0,))]
    assert bench.handle(Aborted(2)) == [Finish(2, FinishReason.ABORT, 1), Free(2, (0,))]
    assert bench.handle(Aborted(2)) == []
    assert bench.handle(Stopped(1, 1)) == []


def test_a_request_whose_grammar_gives_up_fails_alone(bench: Bench) -> None:
    bench.running(1, 4)
    bench.running(2, 4)
    assert bench.handle(RequestFailed(1, "why")) == [Finish(1, FinishReason.ERROR, 1, "why"), Free(1, (0,))]
    assert bench.handle(RequestFailed(1, "why")) == []
    assert bench.handle(Aborted(2)) == [Finish(2, FinishReason.ABORT, 1), Free(2, (0,))]


def test_abort_while_waiting(bench: Bench) -> None:
    bench.arrive(1, 4)
    assert bench.handle(Aborted(1)) == [Finish(1, FinishReason.ABORT, 0)]


def test_tokens_reported_out_of_order(bench: Bench) -> None:
    bench.running(1, 4)
    steps = [bench.decode((0,), (1, 0)), bench.decode((0,), (1, 0))]
    assert bench.done(steps[1], 9) == []
    assert bench.done(steps[0], 8) == [Emit(1, 1, (8,), (-0.5,), 1), Emit(1, 2, (9,), (-0.5,), 1)]


def test_a_row_never_goes_beyond_max_tokens(bench: Bench) -> None:
    bench.running(1, 4, max_tokens=2)
    bench.decode((0,), (1, 0))
    with pytest.raises(PlanError, match="beyond max_tokens"):
        bench.decode((0,), (1, 0))


def test_evicted_requests_keep_their_tokens(bench: Bench) -> None:
    bench.running(1, 4)
    assert bench.handle(Tick(), evicts=(PlannedEvict(1),)) == [Free(1, (0,))]
    view = bench.view(1)
    assert (view.missing, view.running, view.num_evictions) == ((Run(0, 5),), False, 1)
    again = bench.prefill(1, (1,), [Run(0, 5)], [Share(1, 2)])
    assert again.rows[0].tokens == array("i", [100, 101, 102, 103, 7]).tobytes()
    assert bench.done(again, 8) == [Emit(1, 1, (8,), (-0.5,), 1)]


# ---- admission


def test_what_the_pool_cannot_hold_is_rejected_by_name(bench: Bench) -> None:
    (reject,) = bench.arrive(1, 120, max_tokens=10)
    assert isinstance(reject, Reject)
    assert reject.reason is RejectReason.TOO_LARGE
    for number in ("120", "10", "129", "128"):
        assert number in reject.message
    assert bench.arrive(2, 120, max_tokens=9) == []  # the last token needs no KV


def test_full_queue_and_drain() -> None:
    bench = Bench(limits=LimitsConfig(max_waiting=2))
    bench.arrive(1, 4)
    bench.arrive(2, 4)
    (reject,) = bench.arrive(3, 4)
    assert isinstance(reject, Reject)
    assert reject.reason is RejectReason.QUEUE_FULL
    bench.handle(Drain())
    (reject,) = bench.arrive(4, 4)
    assert isinstance(reject, Reject)
    assert reject.reason is RejectReason.DRAINING
    bench.check()


def test_only_those_that_may_start_are_shown() -> None:
    bench = Bench(limits=LimitsConfig(max_running=2))
    bench.running(1, 4)
    for request in (2, 3, 4):
        bench.arrive(request, 4)
    assert [r.request for r in bench.manager.view().requests] == [1, 2]


def test_broken_prompt_is_the_caller_s_bug(bench: Bench) -> None:
    for prompt in (b"", b"\0\0\0"):
        with pytest.raises(ValueError, match="prompt"):
            bench.handle(Arrived(1, prompt, 1))


def test_the_clock_never_runs_back(bench: Bench) -> None:
    with pytest.raises(InvariantError, match="INV-3"):
        bench.manager.handle(Tick(), -1)


# ---- chunks, retention, moves


def test_chunks_and_rehoming(bench: Bench) -> None:
    bench.arrive(1, 20)
    first = bench.prefill(1, (0, 1), [Run(0, 8)], [Share(0, 1), Share(1, 1)])
    assert not first.rows[0].emit
    assert bench.done(first) == []
    rehome = (Rehome(1, 0, 1, 1),)
    last = bench.prefill(1, (0, 1), [Run(8, 12)], [Share(1, 3)], rehome=rehome)
    (move,) = last.moves
    assert (move.src, move.src_page, move.dst, move.run) == (0, first.rows[0].pages[0], 1, Run(0, 4))
    assert move.dst_page not in last.rows[0].pages
    assert bench.view(1).resident[0].tokens == 20
    assert bench.free_pages() == [8, 3, 8, 8]
    bench.done(last, 5)
    bench.check()


def test_a_moved_page_is_not_written_by_the_step_that_reads_it(bench: Bench) -> None:
    """With every other page taken, the old home must not serve as a home of the same step."""
    bench.arrive(1, 32)
    bench.done(bench.prefill(1, (0, 1), [Run(0, 28)], [Share(0, 7)]))
    rehome = (Rehome(1, 0, 1, 3),)
    command = bench.prefill(1, (0, 1), [Run(28, 4)], [Share(0, 1)], rehome=rehome)
    assert not set(command.rows[0].pages) & {move.src_page for move in command.moves}


def test_migrate_is_split_by_the_program_and_the_queue(bench: Bench) -> None:
    bench.running(1, 24)
    planned = PlannedMigrate(Rehome(1, 0, 2, 5))
    first, second = bench.handle(Tick(), migrates=(planned,))
    assert isinstance(first, Migrate)
    assert isinstance(second, Migrate)
    assert [len(first.moves), len(second.moves)] == [2, 2]  # the fifth page has no place in the queue
    assert [move.run.first for move in first.moves + second.moves] == [0, 4, 8, 12]
    assert {r.instance: r.pages for r in bench.view(1).resident} == {0: 2, 2: 4}
    bench.done(first)
    bench.done(second)
    bench.check()


# ---- rules of a plan


def _prefill(
    instances: tuple[int, ...] = (0,),
    rows: tuple[tuple[int, tuple[Run, ...]], ...] = ((2, (FIRST,)),),
    keep: tuple[Share, ...] = (ONE_PAGE,),
    form: ContextForm = RING,
    rehome: tuple[Rehome, ...] = (),
) -> dict[str, object]:
    planned_rows = tuple(PlannedPrefillRow(request, runs) for request, runs in rows)
    return {"prefills": (PlannedPrefill(instances, form, planned_rows, keep, rehome),)}


def _decode(instances: tuple[int, ...] = (0,), rows: tuple[tuple[int, int], ...] = ((1, 0),)) -> dict[str, object]:
    return {"decodes": (PlannedDecode(instances, tuple(PlannedDecodeRow(*row) for row in rows)),)}


BAD_PLANS: dict[str, tuple[str, dict[str, object]]] = {
    "unsorted": ("not sorted", _decode((1, 0))),
    "dop": ("no DoP", _decode((0, 1, 2))),
    "not ready": ("not READY|no READY", _decode((0, 2))),
    "instance": ("no such instance", _decode((7,))),
    "two groups": ("two groups", {**_prefill(), **_decode()}),
    "unknown": ("no live request", _decode(rows=((9, 0),))),
    "twice": ("there twice", _decode(rows=((1, 0), (1, 0)))),
    "no rows": ("no rows", _decode(rows=())),
    "lacks KV": ("lacks KV", _decode(rows=((2, 0),))),
    "master outside": ("master is not in the group", _decode(rows=((1, 1),))),
    "KV outside": ("KV outside", _decode((1,), ((1, 1),))),
    "prefill KV outside": ("KV outside", _prefill((1,), ((1, (Run(4, 1),)),), (Share(1, 1),))),
    "empty runs": ("empty runs", _prefill(rows=((2, ()),))),
    "not first": ("first missing", _prefill(rows=((2, (Run(4, 4),)),))),
    "beyond": ("first missing", _prefill(rows=((2, (Run(0, 9),)),), keep=(Share(0, 3),))),
    "keep": ("keep does not cover", _prefill(keep=(Share(0, 2),))),
    "share": ("bad share", _prefill(keep=(Share(1, 1),))),
    "rows": ("number of rows", _prefill(rows=((2, (Run(0, 4),)),) * 3, keep=(Share(0, 3),))),
    "same row": ("a request twice", _prefill(rows=((2, (Run(0, 4),)),) * 2, keep=(Share(0, 2),))),
    "gather": ("only the ring", _prefill((0, 1), form=ContextForm.GATHER_Q, rehome=(Rehome(2, 0, 1, 1),))),
    "rehome who": ("not in the batch", _prefill((0, 1), rehome=(Rehome(1, 0, 1, 1),))),
    "rehome what": ("no such pages", _prefill((0, 1), rehome=(Rehome(2, 0, 1, 1),))),
    "evict nothing": ("holds no KV", {"evicts": (PlannedEvict(2),)}),
    "migrate": ("no such pages", {"migrates": (PlannedMigrate(Rehome(1, 0, 1, 9)),)}),
    "hold": ("hold_us", {"reservations": (Reservation(1, (0,), 10**12),)}),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_is_named(bench: Bench, case: str) -> None:
    rule, plan = BAD_PLANS[case]
    bench.running(1, 4)
    bench.arrive(2, 8)
    with pytest.raises(PlanError, match=rule):
        bench.handle(Tick(), **plan)


def test_full_queue_is_refused(bench: Bench) -> None:
    bench.running(1, 4)
    bench.decode((0,), (1, 0))
    bench.decode((0,), (1, 0))
    with pytest.raises(PlanError, match="INV-6"):
        bench.decode((0,), (1, 0))


def test_no_free_page_is_refused(bench: Bench) -> None:
    bench.running(1, 32, max_tokens=8)  # all eight pages of instance 0
    with pytest.raises(PlanError, match="INV-10"):
        bench.decode((0,), (1, 0))


def test_a_row_that_changes_groups_waits_for_the_host(bench: Bench) -> None:
    bench.running(1, 4)
    bench.decode((0,), (1, 0))
    with pytest.raises(PlanError, match="did not sample"):
        bench.decode((0, 1), (1, 1))


def test_in_flight_requests_are_not_prefilled_or_evicted(bench: Bench) -> None:
    bench.arrive(1, 8)
    bench.prefill(1, (0,), [Run(0, 4)], [Share(0, 1)])
    with pytest.raises(PlanError, match="step in flight"):
        bench.prefill(1, (0,), [Run(4, 4)], [Share(0, 1)])
    with pytest.raises(PlanError, match="step in flight"):
        bench.handle(Tick(), evicts=(PlannedEvict(1),))


# ---- failures


def test_a_failed_step_costs_the_pools_of_its_group(bench: Bench) -> None:
    bench.arrive(1, 12)
    bench.done(bench.prefill(1, (0, 1), [Run(0, 12)], [Share(0, 2), Share(1, 1)]), 7)
    bench.running(2, 4, instance=2)
    step = bench.decode((0, 1), (1, 1))
    out = bench.handle(StepFailed(step.step, (0, 1), "boom"))
    assert [c for c in out if isinstance(c, Free | Reset)] == [Free(1, (0, 1)), Reset((0, 1))]
    view = bench.view(1)
    assert (view.known, view.issued, view.missing) == (13, 13, (Run(0, 13),))
    assert bench.view(2).running
    bench.check()


def test_an_instance_is_reset_when_nothing_is_queued_on_it(bench: Bench) -> None:
    """{0,1} fails while {1,2} is queued behind it: 1 is not reset before that is reported too."""
    bench.arrive(1, 8)
    bench.done(bench.prefill(1, (0, 1), [Run(0, 8)], [Share(0, 1), Share(1, 1)]), 7)
    bench.running(2, 4, instance=2)
    bench.running(3, 4, instance=2)
    first = bench.decode((0, 1), (1, 0))
    second = bench.decode((1, 2), (2, 2))
    out = bench.handle(StepFailed(first.step, (0, 1), "boom"))
    assert [c for c in out if isinstance(c, Reset)] == [Reset((0,))]
    assert [i.queued for i in bench.manager.view().instances] == [0, 2, 1, 0]
    with pytest.raises(PlanError, match="takes no step"):
        bench.decode((1, 2), (3, 2))
    out = bench.handle(StepFailed(second.step, (1, 2), "boom"))
    assert [c for c in out if isinstance(c, Reset)] == [Reset((1, 2))]
    assert bench.view(2).missing == bench.view(3).missing == (Run(0, 5),)
    bench.check()


def test_a_token_is_not_fed_from_a_pool_that_was_lost(bench: Bench) -> None:
    bench.arrive(1, 4)
    bench.prefill(1, (0, 1), [Run(0, 4)], [Share(0, 1)])
    assert bench.view(1).device_group == (0, 1)
    bench.handle(StepFailed(99, (1,), "boom"))
    assert bench.view(1).device_group == (0,)
    bench.handle(StepFailed(98, (0,), "boom"))
    assert not bench.view(1).running
    bench.check()


def test_a_hole_is_recomputed_between_what_is_left(bench: Bench) -> None:
    bench.arrive(1, 12)
    keep = [Share(0, 1), Share(1, 1), Share(0, 1)]
    bench.done(bench.prefill(1, (0, 1), [Run(0, 12)], keep), 7)
    out = bench.handle(InstanceLost(1))
    assert out == [Free(1, (1,))]
    assert bench.view(1).missing == (Run(4, 4), Run(12, 1))
    step = bench.prefill(1, (0,), [Run(4, 4), Run(12, 1)], [Share(0, 2)])
    assert step.rows[0].emit
    assert bench.done(step, 8) == [Emit(1, 1, (8,), (-0.5,), 1)]
    assert bench.handle(InstanceJoined(1)) == [Reset((1,))]
    bench.check()


def test_lost_instance_ends_what_no_longer_fits(bench: Bench) -> None:
    bench.arrive(1, 100)
    out = bench.handle(InstanceLost(3))  # three are left, and the largest group of the ladder is two
    assert [type(c) for c in out] == [Finish]
    assert isinstance(out[0], Finish)
    assert "instance 3 was lost" in out[0].message
    (reject,) = bench.arrive(2, 100)
    assert isinstance(reject, Reject)
    bench.check()


def test_a_request_whose_steps_always_fail_ends_with_an_error() -> None:
    bench = Bench(limits=LimitsConfig(max_step_failures=3))
    bench.arrive(1, 4)
    for _ in range(2):
        step = bench.prefill(1, (0,), [Run(0, 4)], [Share(0, 1)])
        bench.handle(StepFailed(step.step, (0,), "out of memory"))
    bench.done(bench.prefill(1, (0,), [Run(0, 4)], [Share(0, 1)]), 7)  # a step that is done starts the count anew
    bench.handle(StepFailed(bench.decode((0,), (1, 0)).step, (0,), "out of memory"))
    for _ in range(2):
        assert bench.view(1).num_generated == 1
        step = bench.prefill(1, (0,), [Run(0, 5)], [Share(0, 2)])
        out = bench.handle(StepFailed(step.step, (0,), "out of memory"))
    (finish,) = [c for c in out if isinstance(c, Finish)]
    assert finish.reason is FinishReason.ERROR
    assert "out of memory" in finish.message
    bench.check()


def test_late_completion_of_an_unknown_step_is_ignored(bench: Bench) -> None:
    assert bench.handle(StepDone(99, (1,), (0.0,))) == []


# ---- the rest


def test_prepare_is_asked_once(bench: Bench) -> None:
    bench.arrive(1, 4)
    planned = PlannedPrepare(Program(Phase.DECODE, 2, 4), (0, 2))
    assert bench.handle(Tick(), prepares=(planned,)) == [Prepare(planned.program, (0, 2))]
    assert bench.handle(Tick(), prepares=(planned,)) == []
    bench.handle(ProgramReady(planned.program, (0, 2)))
    assert (planned.program, (0, 2)) in bench.manager.view().ready


def test_cost_update_replaces_coefficients(bench: Bench) -> None:
    before = dict(bench.manager.cost.coefficients)
    bench.handle(CostUpdated({"decode_row_s.1": 9.0}))
    assert dict(bench.manager.cost.coefficients) == {**before, "decode_row_s.1": 9.0}


def test_reservations_end(bench: Bench) -> None:
    bench.arrive(1, 4)
    hold = Reservation(1, (0,), bench.now_us + 1000)
    bench.handle(Tick(), reservations=(hold,))
    bench.manager.check()  # INV-8: idle, but held
    bench.handle(Tick(), reservations=(Reservation(1, (0,), bench.now_us + 2000),))
    assert bench.manager.state.reservations[1].until_us == hold.until_us  # renewing does not prolong
    bench.now_us += 1000
    bench.handle(Tick(), reservations=(Reservation(1, (0,), bench.now_us + 1000),))
    with pytest.raises(InvariantError, match="INV-8"):
        bench.manager.check()


def test_the_policy_sees_no_output_length() -> None:
    """INV-9: whatever is not in these fields cannot sway a policy."""
    assert {name for name in vars(RequestView) if not name.startswith("_")} == {
        "request", "arrived_us", "prompt_len", "known", "issued", "max_tokens", "num_generated", "running", "missing",
        "kv", "resident", "open_page", "device_group", "in_flight", "num_evictions", "score", "prefill_phase", "target",
        "first_token_us",
    }  # fmt: skip


def test_describe_names_requests_and_instances(bench: Bench) -> None:
    bench.running(1, 4)
    bench.arrive(2, 4)
    text = bench.manager.describe()
    for part in ("instance 3", "request 1 decode", "request 2 waiting", "1/8 pages"):
        assert part in text


# ---- adjustments, likeliest tokens, scores


def test_a_row_with_penalties_waits_for_its_token(bench: Bench) -> None:
    """It is told with the row, and others go on meanwhile."""
    adjustment = Adjustment(presence_penalty=1.0)
    adjust, *_ = bench.arrive(1, 4, adjustment=adjustment, stop_ids=(3, 2))
    assert adjust == Adjust(1, adjustment, b"", 4, (2, 3))
    bench.done(bench.prefill(1, (0,), [FIRST], [ONE_PAGE]), 7)
    bench.running(2, 4)
    both = bench.decode((0,), (1, 0), (2, 0))
    assert [row.token for row in both.rows] == [7, 7]
    assert not bench.view(1).running
    assert bench.view(2).running
    with pytest.raises(PlanError, match="penalties"):
        bench.decode((0,), (1, 0))
    alone = bench.decode((0,), (2, 0))
    bench.done(both, 8, 9)
    assert bench.decode((0,), (1, 0)).rows[0].token == 8
    bench.done(alone, 10)
    assert bench.handle(Aborted(1))[:2] == [Finish(1, FinishReason.ABORT, 2), Forget(1)]
    bench.check()


def test_a_bias_is_one_step_late_like_any_other_row(bench: Bench) -> None:
    bench.arrive(1, 4, adjustment=Adjustment(((5, 1.0),), min_tokens=3, repetition_penalty=1.0))
    bench.prefill(1, (0,), [FIRST], [ONE_PAGE])
    assert bench.decode((0,), (1, 0)).rows[0].token == -1


def test_the_prompt_goes_to_the_executor_for_repetition_alone(bench: Bench) -> None:
    (adjust,) = bench.arrive(1, 4, adjustment=Adjustment(repetition_penalty=1.5))
    assert isinstance(adjust, Adjust)
    assert adjust.prompt == array("i", range(100, 104)).tobytes()


def test_likeliest_tokens_reach_the_stream_of_those_who_asked(bench: Bench) -> None:
    top = Top((4, 5), (-0.1, -2.0))
    for request, num_top in ((1, 2), (2, 0)):
        bench.running(request, 4, sampling=Sampling(num_top=num_top))
    step = bench.decode((0,), (1, 0), (2, 0))
    out = bench.handle(StepDone(step.step, (8, 9), (-0.5, -0.5), (top, None)))
    assert [emit.tops for emit in out if isinstance(emit, Emit)] == [(top,), ()]


def scores_of(*values: float) -> Scores:
    return Scores(np.array(values, "<f4").tobytes())


def test_scores_come_in_order_once_and_before_the_first_token(bench: Bench) -> None:
    """Two chunks, an eviction between them, and a failure of the second."""
    bench.arrive(1, 10, num_prompt_top=0)

    def score(*runs: Run) -> RunPrefill:
        num_pages = sum(-(-run.count // 4) for run in runs)
        return bench.prefill(1, (0,), list(runs), [Share(0, num_pages)], score=True)

    def done(step: RunPrefill, *values: float, tokens: tuple[int, ...] = ()) -> list[AnyCommand]:
        out = bench.handle(StepDone(step.step, tokens, tuple(-0.5 for _ in tokens), (), (scores_of(*values),)))
        return [c for c in out if isinstance(c, EmitScores | Emit)]

    with pytest.raises(PlanError, match="scored beside unscored"):
        bench.prefill(1, (0,), [Run(0, 4)], [ONE_PAGE])
    first = score(Run(0, 4))
    (row,) = first.rows
    assert row.targets == array("i", range(101, 105)).tobytes()
    assert done(first, 1, 2, 3, 4) == [EmitScores(1, 1, scores_of(1, 2, 3, 4))]
    bench.handle(Tick(), evicts=(PlannedEvict(1),))
    assert done(score(Run(0, 6)), 1, 2, 3, 4, 5, 6) == [EmitScores(1, 5, scores_of(5, 6))]
    failed = score(Run(6, 3))
    assert not bench.view(1).running, "its last token waits for the scores"
    bench.handle(StepFailed(failed.step, (0,), "boom"))
    assert bench.view(1).missing == (Run(0, 10),)
    last = score(Run(0, 10))
    assert last.rows[0].targets == array("i", [*range(101, 110), 0]).tobytes()
    out = done(last, *range(1, 11), tokens=(7,))
    assert out == [EmitScores(1, 7, scores_of(7, 8, 9)), Emit(1, 0, (7,), (-0.5,), 1)]
    bench.handle(Tick(), evicts=(PlannedEvict(1),))
    bench.prefill(1, (0,), [Run(0, 11)], [Share(0, 3)])  # by an ordinary program: all is out
    bench.check()


def test_scores_need_programs_for_them() -> None:
    bench = Bench(msgspec.structs.replace(CLUSTER, ladder=msgspec.structs.replace(LADDER, score_tokens=())))
    with pytest.raises(ValueError, match="no scoring programs"):
        bench.arrive(1, 4, num_prompt_top=0)
