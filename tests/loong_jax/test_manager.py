"""The manager with plans given by hand: lifecycles, rules, late ends, forks and failures, one by one."""

from __future__ import annotations

from array import array

import pytest

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.linear import LinearCost
from loong_jax.invariants import check_state
from loong_jax.issue import PlanError
from loong_jax.ledger import InvariantError
from loong_jax.manager import Manager
from loong_jax.policy.simple_elastic import SimpleElastic
from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    ContextForm,
    CopyPages,
    CostUpdated,
    Drain,
    Emit,
    Finish,
    FinishReason,
    Fork,
    Forked,
    Free,
    InstanceJoined,
    InstanceLost,
    Migrate,
    Phase,
    Plan,
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
    RequestView,
    Reservation,
    Reset,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    Share,
    StepDone,
    StepFailed,
    Stopped,
    Tick,
    View,
)
from tests.support.schedules import arcs

LADDER = LadderConfig(dops=(1, 2, 4), prefill_tokens=(16, 64), decode_rows=(1, 4), prefill_rows=2, move_pages=2)
CLUSTER = ClusterConfig(
    num_instances=4, page_tokens=4, pages_per_instance=8, ring_tokens=16, query_tile_tokens=16, slots=4, ladder=LADDER
)
RING = ContextForm.RING
FIRST = Run(0, 4)
ONE_PAGE = Share(0, 1)


class Scripted:
    """Gives one plan, once."""

    def __init__(self) -> None:
        self.next = Plan()
        self.seen: View | None = None

    def plan(self, view: View, cost: CostModel) -> Plan:
        plan, self.next, self.seen = self.next, Plan(), view
        return plan


class Bench:
    """A manager, its scripted policy, and every command so far."""

    def __init__(self, cluster: ClusterConfig = CLUSTER, limits: LimitsConfig = LimitsConfig()) -> None:  # noqa: B008
        self.policy = Scripted()
        self.manager = Manager(cluster, limits, self.policy, LinearCost())
        self.now_us = 0
        for program, instances in arcs(cluster):
            self.handle(ProgramReady(program, instances))

    def handle(self, event: AnyEvent, **plan: object) -> list[AnyCommand]:
        self.policy.next = Plan(**plan)  # type: ignore[arg-type]
        self.now_us += 1
        return self.manager.handle(event, self.now_us)

    def arrive(self, request: int, prompt_len: int, max_tokens: int = 8, **fields: object) -> list[AnyCommand]:
        prompt = array("i", range(100, 100 + prompt_len)).tobytes()
        return self.handle(Arrived(request, prompt, max_tokens, **fields))  # type: ignore[arg-type]

    def prefill(
        self, request: int, instances: tuple[int, ...], runs: list[Run], keep: list[Share], **fields: object
    ) -> RunPrefill:
        row = PlannedPrefillRow(request, tuple(runs))
        planned = PlannedPrefill(instances, RING, (row,), tuple(keep), **fields)  # type: ignore[arg-type]
        (command,) = self.handle(Tick(), prefills=(planned,))
        assert isinstance(command, RunPrefill)
        return command

    def decode(self, instances: tuple[int, ...], *rows: tuple[int, int]) -> RunDecode:
        planned = PlannedDecode(instances, tuple(PlannedDecodeRow(request, master) for request, master in rows))
        (command,) = self.handle(Tick(), decodes=(planned,))
        assert isinstance(command, RunDecode)
        return command

    def done(self, command: RunPrefill | RunDecode | Migrate | CopyPages, *tokens: int) -> list[AnyCommand]:
        return self.handle(StepDone(command.step, tokens, tuple(-0.5 for _ in tokens)))

    def running(self, request: int, prompt_len: int, instance: int = 0, max_tokens: int = 8, **fields: object) -> None:
        """A request that has sampled its first token, 7."""
        self.arrive(request, prompt_len, max_tokens, **fields)
        share = Share(instance, -(-prompt_len // 4))
        self.done(self.prefill(request, (instance,), [Run(0, prompt_len)], [share]), 7)

    def view(self, request: int) -> RequestView:
        return next(r for r in self.manager.view().requests if r.request == request)

    def check(self) -> None:
        """Not INV-8: a script leaves requests idle on purpose."""
        check_state(self.manager.state)

    def free_pages(self) -> list[int]:
        return [i.free_pages for i in self.manager.view().instances]


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


# ---- forks


def test_fork_shares_and_copies(bench: Bench) -> None:
    bench.running(1, 10)
    share, copy = bench.handle(Forked(1, 2, 4, Sampling(seed=3)))
    assert isinstance(share, Fork)
    assert isinstance(copy, CopyPages)
    assert [run for _, _, run in share.shared] == [Run(0, 4), Run(4, 4)]
    assert copy.copies[0].run == Run(8, 2)
    child = bench.view(2)
    assert (child.prompt_len, child.known, child.running, child.missing) == (11, 11, True, (Run(10, 1),))
    rows = bench.decode((0,), (1, 0), (2, 0)).rows
    assert rows[0].page != rows[1].page
    assert [row.token for row in rows] == [7, 7]
    assert rows[0].rope_len == rows[1].rope_len > 10, "shared keys were rotated for the parent's length"
    assert bench.handle(Aborted(1)) == [Finish(1, FinishReason.ABORT, 1), Free(1, (0,))]
    bench.check()
    bench.handle(Aborted(2))
    assert bench.free_pages() == [8, 8, 8, 8]


def test_fork_recomputes_what_it_cannot_copy() -> None:
    bench = Bench()
    bench.running(1, 30)  # eight pages: none left for the copy
    (share,) = bench.handle(Forked(1, 2, 1, Sampling()))
    assert isinstance(share, Fork)
    assert bench.view(2).missing == (Run(28, 3),)
    bench.done(bench.prefill(2, (0, 1), [Run(28, 3)], [Share(1, 1)]), 9)
    bench.check()


def test_fork_of_a_finished_parent_ends_at_once(bench: Bench) -> None:
    (finish,) = bench.handle(Forked(1, 2, 4, Sampling()))
    assert isinstance(finish, Finish)
    assert finish.reason is FinishReason.ERROR
    bench.check()


def test_a_fork_that_waits_holds_nothing() -> None:
    bench = Bench(limits=LimitsConfig(max_running=1))
    bench.running(1, 10)
    assert bench.handle(Forked(1, 2, 4, Sampling())) == []
    bench.check()
    bench.handle(Aborted(1))
    assert bench.view(2).missing == (Run(0, 11),)


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
    bench.handle(CostUpdated({"decode_row_s": 9.0}))
    assert dict(bench.manager.cost.coefficients) == {**before, "decode_row_s": 9.0}


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
    assert set(RequestView.__struct_fields__) == {
        "request", "arrived_us", "prompt_len", "known", "issued", "max_tokens", "num_generated", "running", "missing",
        "resident", "open_page", "device_group", "in_flight", "num_evictions",
    }  # fmt: skip


def test_views_of_unchanged_requests_are_kept() -> None:
    cluster, limits = CLUSTER, LimitsConfig()
    manager = Manager(cluster, limits, SimpleElastic(cluster, limits), LinearCost())
    manager.handle(Arrived(1, b"\1\0\0\0", 4), 0)
    assert manager.view().requests[0] is manager.view().requests[0]


def test_describe_names_requests_and_instances(bench: Bench) -> None:
    bench.running(1, 4)
    bench.arrive(2, 4)
    text = bench.manager.describe()
    for part in ("instance 3", "request 1 decode", "request 2 waiting", "1/8 pages"):
        assert part in text
