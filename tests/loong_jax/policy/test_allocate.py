"""Which instances prefill may take, for how long, and which decode groups move together."""

from __future__ import annotations

import msgspec

from loong_jax.policy.allocate import allowance, consolidated
from loong_jax.policy.scale import DecodePlanner
from loong_jax.policy.times import Times
from loong_jax.types import Rehome, Target
from tests.support.views import Seen, decoding, draft, instance


def paced(row: Seen, generated: int, tpot_us: int = 0, since_us: int = 0) -> Seen:
    """A row that generated so many tokens since its first one."""
    return msgspec.structs.replace(
        row, first_token_us=since_us, target=Target(tpot_us=tpot_us), prompt_len=row.issued - generated
    )


TWO = (instance(0), instance(1))


def allowed(*rows: Seen, instances=TWO):
    made = draft(rows, instances)
    times = Times(made.cluster, made.cost)
    return allowance(made, DecodePlanner(made, rows).groups, times)


def test_where_nobody_decodes_nobody_bounds_a_chunk() -> None:
    open_now = allowed()
    assert open_now.open == 0b11
    assert open_now.budget_s == [float("inf")] * 2


def test_one_prefill_at_a_time() -> None:
    assert allowed(instances=(instance(0, queued=1, prefilling=1), instance(1, queued=1))).open == 0b10


def test_rows_that_are_ahead_lend_their_time() -> None:
    row = paced(decoding(0, {0: 8}, in_flight=1), generated=10, tpot_us=30_000)
    found = allowed(row)
    assert found.open == 0b11
    assert 0.25 < found.budget_s[0] < 0.3  # 300 ms ahead, less two steps
    assert found.home == 0b01


def test_rows_that_are_behind_go_first_and_only_the_urgent_may_come_between() -> None:
    found = allowed(paced(decoding(0, {0: 8}, in_flight=1), generated=1, tpot_us=5_000))
    assert (found.open, found.urgent) == (0b10, 0b01)


def test_a_target_that_no_step_can_meet_shuts_nobody_out() -> None:
    assert allowed(paced(decoding(0, {0: 8}, in_flight=1), generated=1, tpot_us=1_000)).open == 0b11


def test_without_a_target_chunk_and_step_alternate() -> None:
    behind = paced(decoding(0, {0: 8}, in_flight=1), generated=1)
    assert allowed(behind).open == 0b11
    assert allowed(msgspec.structs.replace(behind, in_flight=0)).open == 0b10


def test_a_row_far_behind_does_not_hold_the_others() -> None:
    ahead = paced(decoding(0, {0: 4}, in_flight=1), generated=10, tpot_us=30_000)
    lost = paced(decoding(1, {0: 4}, in_flight=1), generated=1, tpot_us=3_000, since_us=-1_000_000)
    assert allowed(ahead, msgspec.structs.replace(lost, first_token_us=0)).open == 0b10
    lost = msgspec.structs.replace(lost, target=Target(tpot_us=3_000), first_token_us=0, prompt_len=lost.issued + 1000)
    assert allowed(ahead, lost).open == 0b11


def test_a_small_group_moves_into_a_large_one_and_not_back() -> None:
    rows = [decoding(i, {0: 2}) for i in range(3)] + [decoding(3, {1: 2})]
    made = draft(rows)
    times = Times(made.cluster, made.cost)
    (move,) = consolidated(made, DecodePlanner(made, rows).groups, times)
    assert move.rehome == Rehome(3, 1, 0, 2)
    assert made.taken == 0b11


def test_nothing_moves_for_little_or_where_there_is_no_room() -> None:
    rows = [decoding(i, {0: 2}) for i in range(3)] + [msgspec.structs.replace(decoding(3, {1: 2}), max_tokens=1)]
    made = draft(rows)
    assert consolidated(made, DecodePlanner(made, rows).groups, Times(made.cluster, made.cost)) == []
    rows[3] = decoding(3, {1: 2})
    made = draft(rows, [instance(0, free=3), instance(1), instance(2), instance(3)])
    assert consolidated(made, DecodePlanner(made, rows).groups, Times(made.cluster, made.cost)) == []


def test_rows_of_the_large_group_are_not_held_up_by_who_joins() -> None:
    def moves(generated: int, tpot_us: int, in_flight: int = 0) -> int:
        home = [decoding(i, {0: 2}, in_flight=in_flight) for i in range(3)]
        rows = [paced(row, generated=generated, tpot_us=tpot_us) for row in home]
        rows.append(paced(decoding(3, {1: 2}), generated=20, tpot_us=30_000))
        made = draft(rows)
        return len(consolidated(made, DecodePlanner(made, rows).groups, Times(made.cluster, made.cost)))

    assert moves(generated=20, tpot_us=3_000) == 1
    assert moves(generated=1, tpot_us=3_000) == 0  # as soon as they have time to lend
    assert moves(generated=1, tpot_us=3_000, in_flight=1) == 1  # behind each step, one
    assert moves(generated=1, tpot_us=1_000) == 1  # they are never in time, and fewer steps serve all


def test_a_row_that_moved_in_part_goes_on_towards_the_others() -> None:
    """Its larger part is where it came from; were that to decide, it would move to and fro for ever."""
    rows = [decoding(i, {0: 2}) for i in range(3)] + [decoding(3, {0: 1, 1: 4})]
    made = draft(rows, [instance(0, free=9), instance(1, free=12), instance(2), instance(3)])
    (move,) = consolidated(made, DecodePlanner(made, rows).groups, Times(made.cluster, made.cost))
    assert move.rehome == Rehome(3, 1, 0, 4)
