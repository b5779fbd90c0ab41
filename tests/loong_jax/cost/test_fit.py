"""The solver finds what was put in, stays non-negative, and is exact."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_jax.cost import fit


def test_finds_what_was_put_in() -> None:
    rng = random.Random(0)
    true = [3.0, 0.5, 2e-6, 0.0]
    rows = [[1.0, rng.uniform(1, 9), rng.uniform(1, 9) * 1e6, rng.uniform(0, 1)] for _ in range(20)]
    assert fit.relative(rows, fit.predicted(rows, true)) == pytest.approx(true, rel=1e-6, abs=1e-9)


@given(st.integers(0, 10_000))
def test_no_feasible_point_nearby_is_better(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.gauss(1, 1) for _ in range(3)] for _ in range(6)]
    targets = [rng.gauss(1, 1) for _ in range(6)]
    least = (0.0, 0.3, -0.2)

    def squares(c: list[float]) -> float:
        return sum((p - t) ** 2 for p, t in zip(fit.predicted(rows, c), targets, strict=True))

    found = fit.nonnegative(rows, targets, least)
    assert all(c >= low for c, low in zip(found, least, strict=True))
    for column in range(3):
        for step in (1e-3, -1e-3):
            other = [c + step * (j == column) for j, c in enumerate(found)]
            if other[column] >= least[column]:
                assert squares(other) >= squares(found) - 1e-12


@given(st.integers(0, 10_000))
def test_equals_the_best_of_all_sets_of_columns(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.gauss(0.5, 1) for _ in range(5)] for _ in range(9)]
    targets = [rng.gauss(0.5, 1) for _ in range(9)]
    best = sum(t * t for t in targets)
    for size in range(1, 6):
        for columns in itertools.combinations(range(5), size):
            cut = np.array(rows)[:, columns]
            c = np.linalg.lstsq(cut, np.array(targets), rcond=None)[0]
            if (c >= 0).all():
                best = min(best, float(((cut @ c - targets) ** 2).sum()))
    found = fit.nonnegative(rows, targets)
    assert min(found) >= 0
    squares = sum((p - t) ** 2 for p, t in zip(fit.predicted(rows, found), targets, strict=True))
    assert squares == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_agrees_with_numpy_where_nothing_is_bound() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(1, 2, (30, 5))
    targets = matrix @ np.arange(1.0, 6.0) + rng.normal(0, 0.01, 30)
    expected = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    assert fit.nonnegative(matrix.tolist(), targets.tolist()) == pytest.approx(expected, rel=1e-6)


def test_columns_that_say_nothing_get_nothing() -> None:
    assert fit.relative([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]], [3.0, 3.0])[1] == 0.0
    assert fit.predicted([[1.0, 0.0, 2.0]], fit.relative([[1.0, 0.0, 2.0]] * 2, [3.0, 3.0])) == pytest.approx([3.0])


def test_bounds() -> None:
    with pytest.raises(ValueError, match="rows"):
        fit.nonnegative([], [])
    with pytest.raises(ValueError, match="32 columns"):
        fit.nonnegative([[1.0] * 33], [1.0])


def test_leaving_a_group_out_really_leaves_it_out() -> None:
    rows, seconds = [[1.0], [1.0], [1.0]], [1.0, 1.0, 5.0]
    errors = fit.leave_out(rows, seconds, ["a", "a", "b"])
    assert errors[2] == pytest.approx(1 / 5 - 1)  # the others know nothing of 5
    assert errors[0] == errors[1] == pytest.approx(4.0)
