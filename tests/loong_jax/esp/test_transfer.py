"""Pages that move outside a prefill: whole, bit by bit, and nothing else is touched."""

import numpy as np
import pytest

from loong_jax.types import Sampling
from tests.support.plane import TP2, Plane, steady_plane


@pytest.fixture
def plane():
    with steady_plane() as plane:
        yield plane


def pages_of(plane: Plane, sequence) -> dict[int, list[np.ndarray]]:
    """First position -> the page's content, by tp rank."""
    pools = plane.pools()
    return {
        run.first: [np.array(pool[:, page]) for pool in pools[instance]]
        for instance, pages in enumerate(sequence.homes)
        for page, run in pages.items()
    }


def changed_pages(before, after) -> set[tuple[int, int]]:
    return {
        (instance, int(page))
        for instance, pools in before.items()
        for rank, pool in enumerate(pools)
        for page in np.flatnonzero((pool != after[instance][rank]).any((0, 2, 3, 4, 5)))
    }


@pytest.mark.parametrize("targets", [{0: 3}, {3: 0}, {0: 3, 3: 0}], ids=str)
def test_migrate(plane: Plane, targets):
    """One way, the other, and both at once (a swap), each of several pages and a partial one."""
    sequence, neighbour = plane.sequence(90), plane.sequence(30)
    plane.prefill((0, 3), [(sequence, 90), (neighbour, 30)], [0, 3, 3])
    held, pools, free = pages_of(plane, sequence), plane.pools(), sequence.homes
    old = {(i, page) for i, pages in enumerate(free) for page in pages}
    plane.migrate(sequence, targets)
    assert {i for i, pages in enumerate(sequence.homes) if pages} == (
        {0, 3} if len(targets) == 2 else {*targets.values()}
    )
    new = {(i, page) for i, pages in enumerate(sequence.homes) for page in pages}
    assert changed_pages(pools, plane.pools()) == new - old
    after = pages_of(plane, sequence)
    assert after.keys() == held.keys()
    for first, [page] in held.items():
        assert (after[first][0] == page).all()
    group = tuple(sorted(sequence.holders() | neighbour.holders()))
    plane.decode(group, [(sequence, max(sequence.holders())), (neighbour, 3)])
    plane.decode((0, 3), [(sequence, 0), (neighbour, 0)])
    plane.check(sequence, neighbour)


def test_fork_copies_open_pages_and_shares_full_ones(plane: Plane):
    """Parent and child write on after the same context, each into pages of its own."""
    parent = plane.sequence(40)
    plane.prefill((1, 2), [(parent, 40)], [1, 1, 2])
    plane.decode((1, 2), [(parent, 2)])
    before = plane.pools()
    child = plane.fork(parent, Sampling(temperature=2.0, seed=11))
    [(copy, run)] = [(p, r) for p, r in child.homes[2].items() if p not in parent.homes[2]]
    assert changed_pages(before, plane.pools()) == {(2, copy)}
    assert run.count == 9
    for step in range(4):
        plane.decode((1, 2), [(child, 2), (parent, 2)] if step % 2 else [(parent, 1), (child, 2)])
    plane.check(parent, child)
    assert parent.tokens[41:] != child.tokens[41:], "the fork shows nothing"
    plane.free(parent)
    plane.decode((1, 2), [(child, 1)])
    plane.check(child)


def test_bf16_on_two_devices_each():
    with steady_plane("bf16", TP2) as plane:
        sequence = plane.sequence(50)
        plane.prefill((0, 2), [(sequence, 50)], [0])
        held = pages_of(plane, sequence)
        plane.migrate(sequence, {0: 2})
        after = pages_of(plane, sequence)
        for first, ranks in held.items():
            for rank, page in enumerate(ranks):
                assert (after[first][rank] == page).all()
        child = plane.fork(sequence, Sampling(seed=1))
        plane.decode((2,), [(sequence, 2), (child, 2)])
        assert sequence.tokens == child.tokens
        plane.check(sequence, child, tolerance=0.1, tie=0.2)
