"""Which READY groups cover a set of instances."""

from __future__ import annotations

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.policy.groups import ReadyGroups, mask_of, members
from loong_jax.types import Phase, PlannedPrepare, Program

CLUSTER = ClusterConfig(num_instances=4, ladder=LadderConfig(dops=(1, 2, 4), prefill_tokens=(128,), decode_rows=(1, 8)))


def ready(*groups: tuple[int, ...], bucket: int = 8) -> ReadyGroups:
    return ReadyGroups(frozenset((Program(Phase.DECODE, len(g), bucket), g) for g in groups))


def test_masks() -> None:
    assert members(mask_of((0, 3, 5))) == (0, 3, 5)


def test_the_smallest_cover() -> None:
    groups = ready((0,), (1, 2), (0, 1, 2, 3))
    found = groups.smallest(Phase.DECODE, mask_of((2,)), mask_of(range(4)))
    assert found is not None
    assert found.instances == (1, 2)
    assert groups.smallest(Phase.DECODE, mask_of((3,)), mask_of((0, 1, 2))) is None
    assert groups.smallest(Phase.PREFILL, mask_of((0,)), mask_of(range(4))) is None


def test_wanted_is_the_smallest_arc_that_is_not_ready() -> None:
    alive = mask_of(range(4))
    wanted = ready((0, 1, 2, 3)).wanted(Phase.DECODE, mask_of((3, 0)), alive, 8, CLUSTER)
    assert wanted == PlannedPrepare(Program(Phase.DECODE, 2, 8), (0, 3))  # neighbours round the corner
    wanted = ready((0, 1, 2, 3)).wanted(Phase.DECODE, mask_of((0, 2)), alive, 8, CLUSTER)
    assert wanted is None  # only the whole is an arc around both, and it is READY


def test_wanted_without_an_arc_is_a_set() -> None:
    alive = mask_of((0, 2, 3))
    wanted = ready().wanted(Phase.DECODE, mask_of((0, 2)), alive, 8, CLUSTER)
    assert wanted == PlannedPrepare(Program(Phase.DECODE, 2, 8), (0, 2))
    assert ready().wanted(Phase.DECODE, alive, alive, 8, CLUSTER) is None  # three of three: no DoP of the ladder
