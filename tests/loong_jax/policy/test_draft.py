"""What a plan has left, whom it evicts, and which programs it asks for."""

from __future__ import annotations

from loong_jax.policy.groups import mask_of
from loong_jax.types import Phase, PlannedPrepare, Program
from tests.support.views import cluster, decoding, draft, instance, prompting


def test_room_is_where_a_living_queue_has_room() -> None:
    made = draft([], [instance(0, queued=2), instance(1, queued=1), instance(2, alive=False), instance(3, free=0)])
    assert made.alive == mask_of((0, 1, 3))
    assert made.room == mask_of((1, 3))
    assert made.free == {0: 16, 1: 16, 2: 16, 3: 0}


def test_the_oldest_is_the_blocked_one() -> None:
    made = draft([])
    for request in (5, 3, 4):
        made.block(prompting(request, 8))
    assert made.blocked is not None
    assert made.blocked.request == 3


def test_the_victim_is_the_newest_holder_within_reach_and_never_older() -> None:
    oldest, middle, newest = decoding(0, {0: 1}), decoding(1, {1: 1}), decoding(2, {2: 1})
    made = draft([oldest, middle, newest, prompting(3, 8)])
    assert made.victim(oldest) is newest
    assert made.victim(newest) is None  # all others are older
    near = [(program, group) for program, group in made.view.ready if max(group) < 2]
    assert draft([oldest, middle, newest], ready=near).victim(oldest) is middle  # no group joins 0 and 2


def test_the_only_holder_may_be_its_own_victim() -> None:
    only = decoding(0, {0: 1})
    assert draft([only]).victim(only) is only
    assert draft([prompting(0, 8)]).victim(prompting(0, 8)) is None


def test_wanted_programs_have_the_smallest_bucket_that_fits() -> None:
    made = draft([], ready=[])
    assert made.want(Phase.DECODE, mask_of((1,)), 1)
    assert made.want(Phase.PREFILL, mask_of((1, 2)), 99)  # nothing is as large: the largest
    assert made.prepares == [
        PlannedPrepare(Program(Phase.DECODE, 1, 2), (1,)),
        PlannedPrepare(Program(Phase.PREFILL, 2, 16), (1, 2)),
    ]
    assert cluster().ladder.prefill_tokens == (16,)
    made = draft([])
    assert not made.want(Phase.DECODE, mask_of((1,)), 1)  # READY already
    assert not made.prepares
