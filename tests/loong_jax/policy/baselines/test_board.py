"""What baselines share: groups of the living, memory to come, programs asked for."""

from __future__ import annotations

from loong_jax.policy.baselines.board import Board, Buckets, future_pages, largest_group
from loong_jax.policy.groups import mask_of
from loong_jax.types import Phase, Program
from tests.support.schedules import arcs
from tests.support.views import cluster, draft, prompting


def board(requests=(), ready=None) -> Board:
    made = draft(requests)
    buckets = Buckets()
    buckets.refresh(frozenset(arcs(made.cluster) if ready is None else ready))
    return Board(made.cluster, made.limits, buckets, made.view, made.cost)


def test_the_largest_group_is_of_neighbours_where_it_can_be() -> None:
    eight = cluster(8, (1, 2, 3, 4, 8))
    assert largest_group(eight, 0xFF) == tuple(range(8))
    assert largest_group(eight, 0xFF & ~(1 << 5)) == (0, 1, 2, 3)
    assert largest_group(eight, mask_of((0, 1, 6, 7))) == (0, 1, 6, 7)  # round the end
    assert largest_group(eight, mask_of((0, 2, 4, 6, 7))) == (0, 2, 4, 6)  # no neighbours
    assert largest_group(eight, 0) == ()


def test_memory_is_most_needed_when_the_shortest_end() -> None:
    """Pages of 4. A: 8 tokens known, 10 to come; B: 40 and 2. Two steps on both are there, (8 + 2) + (40 + 2), and that
    is more than A alone at its end, 18. Each may have a page but for a token empty: (10 + 42 + 2 * 3) / 4."""
    a, b = prompting(0, 8), prompting(1, 40)
    lengths = {0: 10, 1: 2}

    class Bounded:
        def __init__(self, request) -> None:
            self.prompt_len, self.known, self.max_tokens = request.prompt_len, request.known, lengths[request.request]

    assert future_pages(board(), [Bounded(a), Bounded(b)]) == 15
    assert future_pages(board(), [Bounded(a)]) == 6
    assert future_pages(board(), []) == 0


def test_a_program_that_is_not_ready_is_asked_for() -> None:
    made = board(ready=[(Program(Phase.DECODE, 1, 2), (0,))])
    assert made.bucket(Phase.DECODE, (0,), 2) == 2
    assert not made.prepares
    assert made.bucket(Phase.DECODE, (0,), 9) == 2  # the ladder has no larger one
    assert not made.prepares
    assert made.bucket(Phase.PREFILL, (0, 1), 3) == 0
    assert [(p.program, p.instances) for p in made.prepares] == [(Program(Phase.PREFILL, 2, 16), (0, 1))]
