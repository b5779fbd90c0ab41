"""Chunks end with their time; the better form is taken."""

from __future__ import annotations

from loong_jax.cost import row_pairs
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.policy.times import Times
from loong_jax.types import ContextForm
from tests.support.views import cluster

TIMES = Times(cluster(), unmeasured())


def seconds(tokens: int, resident: int) -> float:
    return TIMES.step_s(2, tokens, row_pairs(tokens, resident), resident)


def test_a_chunk_is_the_longest_of_whole_pages_within_its_time() -> None:
    for resident in (0, 10_000):
        tokens = TIMES.chunk_tokens(2, resident, 0.1, 1 << 20)
        assert tokens % 4 == 0
        assert seconds(tokens, resident) <= 0.1 < seconds(tokens + 4, resident)


def test_a_chunk_is_a_page_at_least_and_no_more_than_there_is() -> None:
    assert TIMES.chunk_tokens(2, 0, 0.0, 100) == 4
    assert TIMES.chunk_tokens(2, 0, 0.0, 3) == 3
    assert TIMES.chunk_tokens(2, 0, 10.0, 101) == 101


def test_small_chunks_over_long_context_gather_queries_and_large_ones_rotate_it() -> None:
    assert TIMES.form(2, 64, row_pairs(64, 50_000), 50_000)[0] is ContextForm.GATHER_Q
    assert TIMES.form(2, 50_000, row_pairs(50_000, 64), 64)[0] is ContextForm.RING
    assert TIMES.form(2, 64, row_pairs(64, 0), 0)[0] is ContextForm.RING


def test_alone_is_the_better_of_one_and_all() -> None:
    assert TIMES.alone_s(4, 0) == TIMES.step_s(1, 4, 8, 0)
    assert TIMES.alone_s(100_000, 0) == TIMES.step_s(4, 100_000, 5e9, 0)
