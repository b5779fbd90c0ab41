"""What a prompt of many chunks leaves to others. Seconds are those of eight A800 pairs."""

from __future__ import annotations

import msgspec

from loong_jax.config import LimitsConfig
from loong_jax.cost.presets import cost_for
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import ReadyGroups
from loong_jax.policy.long_prompts import UNDISTURBED, LongPrompts
from loong_jax.policy.times import Times
from loong_jax.sim import sim_cluster
from loong_jax.types import InstanceView, Resident, Run
from tests.support.views import Seen, SeenView

CLUSTER = sim_cluster(8, pool_tokens=210_000, tp=2)
LIMITS = LimitsConfig()
COST = cost_for("A800", "lwm-7b", 2, 8)


def prompt(request: int, length: int, done: dict[int, int] | None = None, in_flight: int = 0) -> Seen:
    """`done`: tokens of KV by instance."""
    held = tuple(Resident(i, n, -(-n // 16)) for i, n in (done or {}).items())
    first = sum(r.tokens for r in held)
    runs = (Run(first, length - first),)
    return Seen(request, 0, length, length, length, 100, 0, False, runs, held, in_flight=in_flight)


def beside(usual: int, *active: Seen) -> LongPrompts:
    instances = tuple(InstanceView(i, 13_000, 13_125, 0, 0, True) for i in range(8))
    view = SeenView(16, instances, active, usual_prompt=usual)
    return LongPrompts(Draft(CLUSTER, LIMITS, ReadyGroups(frozenset()), view, COST), Times(CLUSTER, COST), active)


LONG = prompt(0, 1_000_000)


def test_short_ones_get_a_quarter_and_chunks_may_last() -> None:
    long = beside(4_000)
    assert long.most_instances(LONG) == 6
    assert long.chunk_s(LONG) == UNDISTURBED * LIMITS.chunk_us * 1e-6
    assert long.most_instances(prompt(1, 4_000)) == 8
    assert long.chunk_s(prompt(1, 4_000)) == LIMITS.chunk_us * 1e-6


def test_longer_ones_take_turns_with_its_chunks() -> None:
    for usual in (0, 30_000):  # and where nobody knows yet what comes
        long = beside(usual)
        assert long.most_instances(LONG) == 7
        assert long.chunk_s(LONG) == LIMITS.chunk_us * 1e-6


def test_it_gives_way_to_one_that_began_on_few_instances() -> None:
    other = prompt(1, 50_000, {7: 3_000})
    assert beside(30_000, LONG, other).gives_way(LONG) is other
    assert beside(30_000, LONG, msgspec.structs.replace(other, in_flight=1)).gives_way(LONG) is not None
    assert beside(30_000, LONG, prompt(1, 5_000, {7: 3_000})).gives_way(LONG) is None  # through where it is
    assert beside(30_000, LONG, prompt(1, 50_000)).gives_way(LONG) is None  # has its turn before
    assert beside(30_000, LONG, prompt(1, 1_000_000, {7: 3_000})).gives_way(LONG) is None
    assert beside(4_000, LONG, other).gives_way(LONG) is None
    assert beside(30_000, LONG, other).gives_way(prompt(2, 9_000)) is None


def test_decodes_leave_room_while_one_is_computed_apart() -> None:
    assert beside(4_000, msgspec.structs.replace(LONG, in_flight=1)).under_way()
    assert not beside(4_000, LONG).under_way()
    assert not beside(30_000, msgspec.structs.replace(LONG, in_flight=1)).under_way()


def test_rows_move_out_of_its_way() -> None:
    assert beside(4_000, prompt(0, 1_000_000, {1: 500, 2: 500})).homes == 0b110
    assert beside(4_000, prompt(0, 9_000, {1: 500, 2: 500})).homes == 0
