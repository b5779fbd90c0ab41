"""Least squares for cost models: few coefficients, none negative, errors relative to what was measured.

Pure Python on purpose: the same measurements give the same bits on every machine, so that a simulation repeats, and a
refit in the live engine imports nothing. What it is not: a choice of features (`roofline.py`, `fitted.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_COLUMNS = 32
_ROUNDS = 10  # per column; a few are enough
_FLAT = 1e-12  # a slope that is only rounding
_SINGULAR = 1e-12  # of a column's squared length that is left beside the others


def relative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients c >= 0 that minimise the sum of ((row . c - s) / s)^2. `seconds` are positive."""
    return nonnegative([[x / s for x in row] for row, s in zip(rows, seconds, strict=True)], [1.0] * len(rows))


def nonnegative(rows: Sequence[Sequence[float]], targets: Sequence[float], least: Sequence[float] = ()) -> list[float]:
    """Coefficients c >= `least` (0 by default) that minimise the sum of (row . c - target)^2. Columns that are zero, or
    sums of others, get the least. Raises ValueError without rows or with more than MAX_COLUMNS columns."""
    if not rows or len(rows[0]) > MAX_COLUMNS:
        raise ValueError(f"a fit needs rows, and at most {MAX_COLUMNS} columns")
    num = len(rows[0])
    if least:
        targets = [t - p for t, p in zip(targets, predicted(rows, least), strict=True)]
        return [a + b for a, b in zip(nonnegative(rows, targets), least, strict=True)]
    scales = [sum(row[j] * row[j] for row in rows) ** 0.5 or 1.0 for j in range(num)]
    unit = [[x / scale for x, scale in zip(row, scales, strict=True)] for row in rows]
    gram = [[sum(row[i] * row[j] for row in unit) for j in range(num)] for i in range(num)]
    moment = [sum(row[i] * t for row, t in zip(unit, targets, strict=True)) for i in range(num)]
    found = _active_set(gram, moment)
    return [c / scale for c, scale in zip(found, scales, strict=True)]


def _active_set(gram: list[list[float]], moment: list[float]) -> list[float]:
    """Lawson and Hanson's method (Solving Least Squares Problems, chapter 23) on the normal equations of unit columns:
    the column that would help most comes in; those that would turn negative go out."""
    num = len(moment)
    found = [0.0] * num
    used: list[int] = []
    barred: set[int] = set()  # depend on columns in use
    for _ in range(_ROUNDS * num):
        slope = [m - sum(g * c for g, c in zip(line, found, strict=True)) for m, line in zip(moment, gram, strict=True)]
        candidates = [j for j in range(num) if j not in used and j not in barred and slope[j] > _FLAT]
        if not candidates:
            break
        best = candidates[0]
        for j in candidates:
            best = j if slope[j] > slope[best] else best
        solved = _solve(gram, moment, [*used, best])
        if solved is None or solved[-1] <= 0:  # a column that says nothing new, but for rounding
            barred.add(best)
            continue
        used.append(best)
        barred.clear()
        while solved and min(solved) <= 0:
            step = min(found[j] / (found[j] - c) for j, c in zip(used, solved, strict=True) if c <= 0)
            for j, c in zip(used, solved, strict=True):
                found[j] += step * (c - found[j])
            kept = [j for j, c in zip(used, solved, strict=True) if found[j] > _SINGULAR or c > 0]
            for j in set(used) - set(kept):
                found[j] = 0.0
            used = kept
            solved = _solve(gram, moment, used) or []
        for j, c in zip(used, solved, strict=True):
            found[j] = c
    return found


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
