"""Placement by hand."""

from __future__ import annotations

import random

import pytest

from loong_jax.policy import placement
from loong_jax.types import Rehome, Resident, Share
from tests.support.views import Seen


def view(**held: int) -> Seen:
    """Pages by instance: view(i0=3)."""
    resident = tuple(Resident(int(name[1:]), pages * 4, pages) for name, pages in held.items())
    return Seen(1, 0, 100, 100, 100, 10, 0, False, (), resident, None, (), 0, 0)


def test_even_levels_what_is_there() -> None:
    free = {0: 10, 1: 10, 2: 1}
    placed = placement.even(view(i0=3), 8, (0, 1, 2), free)
    assert {share.instance: share.pages for share in placed.keep} == {0: 2, 1: 5, 2: 1}
    assert free == {0: 8, 1: 5, 2: 0}


def test_packed_prefers_the_holder() -> None:
    placed = placement.packed(view(i1=3), 4, (0, 1, 2), {0: 20, 1: 10, 2: 20}, 2, [0, 5, 0])
    assert placed == placement.Placement((Share(1, 4),), ())


def test_packed_spreads_by_load() -> None:
    placed = placement.packed(view(), 4, (0, 1, 2), {0: 20, 1: 10, 2: 10}, 2, [1, 0, 0])
    assert placed.keep == (Share(1, 4),)


def test_packed_moves_the_rest() -> None:
    free = {0: 3, 1: 9, 2: 2}
    placed = placement.packed(view(i0=1, i1=1, i2=2), 4, (0, 1, 2), free, 1, [0, 0, 0])
    assert placed == placement.Placement((Share(1, 4),), (Rehome(1, 0, 1, 1), Rehome(1, 2, 1, 2)))
    assert free[1] == 2


@pytest.mark.parametrize("seed", range(50))
def test_shares_fit_and_cover(seed: int) -> None:
    rng = random.Random(seed)
    instances = tuple(range(rng.randint(1, 5)))
    held = {f"i{i}": rng.randint(1, 5) for i in instances if rng.random() < 0.5}
    free = {i: rng.randint(0, 9) for i in instances}
    before, total = dict(free), sum(free.values())
    num_units = rng.randint(0, total)
    placed = placement.packed(view(**held), num_units, instances, free, rng.randint(0, 3), [0] * 5)
    assert sum(share.pages for share in placed.keep) == num_units
    taken = dict.fromkeys(instances, 0)
    for share in placed.keep:
        taken[share.instance] += share.pages
    moved: dict[int, int] = {}
    for rehome in placed.rehome:
        taken[rehome.dst] += rehome.pages
        moved[rehome.src] = moved.get(rehome.src, 0) + rehome.pages
    assert all(before[i] - taken[i] == free[i] >= 0 for i in instances)
    assert all(pages == held[f"i{src}"] for src, pages in moved.items()), "an instance is left whole or not at all"


def test_no_instance_holds_more_than_it_can_read_in_time() -> None:
    """Ten pages fit on one; with six at most, they are shared out, unless that cannot be. What moves counts too."""
    limit = dict.fromkeys(range(4), 6)
    placed = placement.packed(view(), 10, range(4), dict.fromkeys(range(4), 16), 0, [0] * 4, limit)
    assert [share.pages for share in placed.keep] == [5, 5]
    placed = placement.packed(view(), 10, (0,), {0: 16}, 0, [0] * 4, limit)
    assert placed.keep == (Share(0, 10),)
    placed = placement.packed(view(i2=3, i3=3), 6, range(4), {0: 16, 1: 16, 2: 0, 3: 0}, 0, [0] * 4, limit)
    after = {0: 0, 1: 0}
    for share in placed.keep:
        after[share.instance] += share.pages
    for rehome in placed.rehome:
        after[rehome.dst] += rehome.pages
    assert after == {0: 6, 1: 6}
