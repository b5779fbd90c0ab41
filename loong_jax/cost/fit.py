"""Least squares for cost models: few coefficients, none negative, errors relative to what was measured.

Pure Python on purpose: the same measurements give the same bits on every machine, so that a simulation repeats, and a
refit in the live engine imports nothing. What it is not: a choice of features (`roofline.py`, `fitted.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

_SINGULAR = 1e-12  # of a column's squared length that is left beside the others


def relative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients c >= 0 that minimise the sum of ((row . c - s) / s)^2. `seconds` are positive."""
    return nonnegative([[x / s for x in row] for row, s in zip(rows, seconds, strict=True)], [1.0] * len(rows))


def nonnegative(rows: Sequence[Sequence[float]], targets: Sequence[float], least: Sequence[float] = ()) -> list[float]:
    """Coefficients c >= `least` (0 by default) that minimise the sum of (row . c - target)^2, exactly: the best of all
    sets of columns that are above it. Columns that are zero, or sums of others, get the least. Raises ValueError
    without rows or with more than 8 columns."""
    if not rows or len(rows[0]) > 8:
        raise ValueError("a fit needs rows, and at most 8 columns")
    num = len(rows[0])
    if least:
        targets = [t - p for t, p in zip(targets, predicted(rows, least), strict=True)]
        return [a + b for a, b in zip(nonnegative(rows, targets), least, strict=True)]
    scales = [sum(row[j] * row[j] for row in rows) ** 0.5 or 1.0 for j in range(num)]
    unit = [[x / scale for x, scale in zip(row, scales, strict=True)] for row in rows]
    gram = [[sum(row[i] * row[j] for row in unit) for j in range(num)] for i in range(num)]
    moment = [sum(row[i] * t for row, t in zip(unit, targets, strict=True)) for i in range(num)]
    best, best_gain = [0.0] * num, 0.0
    for size in range(1, num + 1):
        for columns in combinations(range(num), size):
            solved = _solve(gram, moment, columns)
            if solved is None or min(solved) < 0:
                continue
            gain = sum(
                c * moment[j] for c, j in zip(solved, columns, strict=True)
            )  # what it takes off the sum of squares
            if gain > best_gain:
                best_gain, best = gain, [0.0] * num
                for c, j in zip(solved, columns, strict=True):
                    best[j] = c / scales[j]
    return best


def _solve(gram: list[list[float]], moment: list[float], columns: Sequence[int]) -> list[float] | None:
    """The normal equations of some columns, by Cholesky; None where the columns depend on each other."""
    size = len(columns)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = gram[columns[i]][columns[j]] - sum(lower[i][k] * lower[j][k] for k in range(j))
            if i > j:
                lower[i][j] = rest / lower[j][j]
            elif rest <= _SINGULAR:
                return None
            else:
                lower[i][i] = rest**0.5
    out = [moment[column] for column in columns]
    for i in range(size):
        out[i] = (out[i] - sum(lower[i][k] * out[k] for k in range(i))) / lower[i][i]
    for i in reversed(range(size)):
        out[i] = (out[i] - sum(lower[k][i] * out[k] for k in range(i + 1, size))) / lower[i][i]
    return out


def predicted(rows: Sequence[Sequence[float]], coefficients: Sequence[float]) -> list[float]:
    return [sum(x * c for x, c in zip(row, coefficients, strict=True)) for row in rows]


def relative_errors(predictions: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Signed: 0.1 is a prediction 10% too long."""
    return [p / s - 1 for p, s in zip(predictions, seconds, strict=True)]


def leave_out(
    rows: Sequence[Sequence[float]],
    seconds: Sequence[float],
    groups: Sequence[object],
    fitted: Callable[[Sequence[Sequence[float]], Sequence[float]], Sequence[float]] = relative,
) -> list[float]:
    """Relative error of each measurement under a fit that saw no measurement of its group."""
    out = [0.0] * len(rows)
    for group in dict.fromkeys(groups):
        kept = [i for i, g in enumerate(groups) if g != group]
        coefficients = fitted([rows[i] for i in kept], [seconds[i] for i in kept])
        for i in (i for i, g in enumerate(groups) if g == group):
            out[i] = relative_errors(predicted([rows[i]], coefficients), [seconds[i]])[0]
    return out
