"""Units and buckets, by hand and by property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_jax import buckets
from loong_jax.config import LadderConfig
from loong_jax.types import Run

LADDER = LadderConfig(dops=(1, 2, 4), prefill_tokens=(128, 512), decode_rows=(1, 8))


def test_units_are_cut_from_each_run() -> None:
    assert buckets.units([Run(0, 40)], 16) == [Run(0, 16), Run(16, 16), Run(32, 8)]
    assert buckets.units([Run(5, 3), Run(20, 17)], 16) == [Run(5, 3), Run(20, 16), Run(36, 1)]
    assert buckets.units([], 16) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 100))), st.integers(1, 20))
def test_units_tile_the_runs(pieces: list[tuple[int, int]], page_tokens: int) -> None:
    runs, position = [], 0
    for gap, count in pieces:
        runs.append(Run(position + gap, count))
        position = runs[-1].end
    units = buckets.units(runs, page_tokens)
    assert [p for u in units for p in range(u.first, u.end)] == [p for r in runs for p in range(r.first, r.end)]
    assert all(1 <= unit.count <= page_tokens for unit in units)
    assert len(units) == buckets.num_units(runs, page_tokens)


@pytest.mark.parametrize(
    ("num_units", "dop", "expected"),
    [(1, 1, 128), (8, 1, 128), (9, 1, 512), (32, 1, 512), (33, 1, None), (32, 4, 128), (33, 4, 512), (129, 4, None)],
)
def test_prefill_bucket(num_units: int, dop: int, expected: int | None) -> None:
    """With 16-token pages, 128 tokens are 8 units an instance."""
    assert buckets.prefill_bucket(num_units, dop, LADDER.prefill_tokens, 16) == expected


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 8), (8, 8), (9, None)])
def test_decode_bucket(rows: int, expected: int | None) -> None:
    assert buckets.decode_bucket(rows, LADDER) == expected
