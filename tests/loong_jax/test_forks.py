"""Forks with plans given by hand: what is shared, who waits for whom, and a parent that ends first."""

from __future__ import annotations

import pytest

from loong_jax.config import LimitsConfig
from loong_jax.types import (
    Aborted,
    AnyCommand,
    CopyPages,
    Emit,
    Finish,
    FinishReason,
    Fork,
    Forked,
    Free,
    Run,
    Sampling,
    Share,
)
from tests.support.bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


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


def fork_at_prompt(bench: Bench, child: int, num_prompt: int = 10) -> list[AnyCommand]:
    return bench.handle(Forked(1, child, 4, Sampling(seed=child), known=num_prompt))


def test_choices_wait_for_the_first_token_and_share_the_prompt(bench: Bench) -> None:
    """Held until the parent's prompt is computed; then each samples its own first token, by a decode step."""
    bench.arrive(1, 10)
    assert fork_at_prompt(bench, 2) == fork_at_prompt(bench, 3) == []
    assert [r.request for r in bench.manager.view().requests] == [1], "nobody may start them"
    out = bench.done(bench.prefill(1, (0,), [Run(0, 10)], [Share(0, 3)]), 7)
    assert [type(c) for c in out] == [Emit, Fork, CopyPages, Fork, CopyPages]
    for child in (2, 3):
        view = bench.view(child)
        assert (view.prompt_len, view.known, view.running, view.missing) == (10, 10, True, (Run(9, 1),))
    for command in out:
        if isinstance(command, CopyPages):
            assert command.copies[0].run == Run(8, 1), "the parent's token 9 is computed again by each child"
            bench.done(command)
    rows = bench.decode((0,), (1, 0), (2, 0), (3, 0)).rows
    assert [(row.position, row.token) for row in rows] == [(10, 7), (9, 109), (9, 109)]
    assert len({row.page for row in rows}) == 3
    bench.check()


def test_a_choice_of_a_parent_that_is_ahead_shares_only_the_prompt(bench: Bench) -> None:
    bench.running(1, 10)
    bench.done(bench.decode((0,), (1, 0)), 8)
    bench.decode((0,), (1, 0))
    fork, copy = fork_at_prompt(bench, 2)
    assert isinstance(fork, Fork)
    assert isinstance(copy, CopyPages)
    assert (fork.shared[-1][2], copy.copies[0].run) == (Run(4, 4), Run(8, 1))
    assert bench.view(2).known == 10
    bench.check()


def test_choices_of_a_parent_that_ends_with_its_first_token_share_its_pages(bench: Bench) -> None:
    bench.arrive(1, 10, max_tokens=1)
    fork_at_prompt(bench, 2)
    out = bench.done(bench.prefill(1, (0,), [Run(0, 10)], [Share(0, 3)]), 7)
    assert [type(c) for c in out] == [Emit, Fork, CopyPages, Finish, Free]
    assert bench.view(2).running
    bench.check()


@pytest.mark.parametrize("prefilled", [False, True])
def test_choices_go_on_without_a_parent_that_is_gone(bench: Bench, prefilled: bool) -> None:
    bench.arrive(1, 10)
    fork_at_prompt(bench, 2)
    if prefilled:
        bench.prefill(1, (0,), [Run(0, 10)], [Share(0, 3)])
    bench.handle(Aborted(1))
    assert bench.view(2).missing == (Run(0, 10),)
    bench.check()


def test_choices_without_a_place_are_held_until_there_is_one() -> None:
    bench = Bench(limits=LimitsConfig(max_running=2))
    bench.arrive(1, 10)
    fork_at_prompt(bench, 2)
    fork_at_prompt(bench, 3)
    out = bench.done(bench.prefill(1, (0,), [Run(0, 10)], [Share(0, 3)]), 7)
    assert [c.child for c in out if isinstance(c, Fork)] == [2]
    bench.check()
    assert [c.child for c in bench.handle(Aborted(2)) if isinstance(c, Fork)] == [3], "while the parent lives"
    bench.check()


def test_a_held_choice_can_be_aborted(bench: Bench) -> None:
    bench.arrive(1, 10)
    fork_at_prompt(bench, 2)
    assert bench.handle(Aborted(2)) == [Finish(2, FinishReason.ABORT, 0)]
    assert not bench.manager.state.held
    bench.check()


def test_a_fork_beyond_the_text_is_our_bug(bench: Bench) -> None:
    bench.arrive(1, 10)
    with pytest.raises(ValueError, match="11 tokens"):
        fork_at_prompt(bench, 2, 11)
