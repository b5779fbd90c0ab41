"""Rows to groups, groups to masters, and the instance more."""

from __future__ import annotations

from loong_jax.policy.groups import mask_of
from loong_jax.policy.scale import DecodePlanner
from loong_jax.types import Phase, PlannedDecode, PlannedDecodeRow
from tests.support.views import Seen, decoding, draft, instance


def planned(*requests: Seen, **kwargs) -> list[tuple[tuple[int, ...], dict[int, int]]]:
    """(instances, master by request) of each step."""
    steps = DecodePlanner(draft(requests, **kwargs), requests).plan()
    return [(step.instances, {row.request: row.master for row in step.rows}) for step in steps]


def test_disjoint_rows_run_apart_and_rows_that_share_an_instance_together() -> None:
    rows = (decoding(0, {0: 1}), decoding(1, {1: 1, 2: 1}), decoding(2, {2: 1}), decoding(3, {3: 1}))
    assert [group for group, _ in planned(*rows)] == [(0,), (1, 2), (3,)]


def test_rows_that_overlap_are_merged_whatever_their_order() -> None:
    rows = (decoding(0, {0: 1}), decoding(1, {1: 1}), decoding(2, {0: 1, 1: 1}))
    assert planned(*rows) == [((0, 1), {0: 0, 1: 1, 2: 0})]


def test_the_master_holds_the_open_page_or_else_kv() -> None:
    assert planned(decoding(0, {0: 3, 1: 1}, open_page=(1, 2))) == [((0, 1), {0: 1})]
    assert planned(decoding(0, {0: 3, 1: 1}), instances=[instance(0, free=1), instance(1)]) == [((0, 1), {0: 1})]


def test_a_master_serves_a_bucket_of_rows_and_the_newest_token_lies_on_it() -> None:
    rows = [decoding(i, {0: 1}) for i in range(4)]
    assert planned(*rows) == [((0,), {0: 0, 1: 0})]  # a bucket of two
    row = decoding(0, {0: 1, 1: 1}, device_group=(1,), in_flight=1)
    assert planned(row) == [((0, 1), {0: 1})]


def test_an_instance_more_when_no_page_is_free() -> None:
    assert planned(decoding(0, {1: 16}), instances=[instance(0), instance(1, free=0), instance(2, free=3)]) == [
        ((0, 1), {0: 0})
    ]


def test_without_a_page_anywhere_the_oldest_row_is_blocked() -> None:
    rows = (decoding(0, {0: 8}), decoding(1, {0: 8}))
    made = draft(rows, [instance(0, free=0), instance(1, free=0)])
    assert DecodePlanner(made, rows).plan() == []
    assert made.blocked is rows[0]


def test_groups_wait_for_room_and_a_step_takes_its_instances() -> None:
    rows = (decoding(0, {0: 1}), decoding(1, {1: 1}))
    made = draft(rows, [instance(0, queued=2), instance(1)])
    assert DecodePlanner(made, rows).plan() == [PlannedDecode((1,), (PlannedDecodeRow(1, 1),))]
    assert made.taken == mask_of((1,))
    assert made.load == [1, 1]


def test_a_larger_ready_group_serves_meanwhile_and_the_better_one_is_asked_for() -> None:
    whole = [(p, g) for p, g in draft([]).view.ready if len(g) == 4]
    made = draft([decoding(0, {1: 1})], ready=whole)
    (step,) = DecodePlanner(made, made.view.requests).plan()
    assert step.instances == (0, 1, 2, 3)
    assert [(p.program.phase, p.instances) for p in made.prepares] == [(Phase.DECODE, (1,))]


def test_rows_that_no_group_can_span_are_stuck() -> None:
    row = decoding(0, {0: 1, 1: 1})
    made = draft([row], [instance(0), instance(1, alive=False)])
    assert DecodePlanner(made, [row]).plan() == []
    assert made.stuck == [row]
