"""A cost model corrected by what steps really took: new coefficients near the old ones.

Live traffic says little about most coefficients (a chat server decodes the same few rows for hours), so a free fit
would make nonsense of them. Here each one is scaled: all by what the steps took longer in the median, then each by
least squares that holds it to that with the weight of a few steps. What it is not: the timing of steps
(`serving/step_times.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from loong_jax.cost import fit
from loong_jax.cost.fitted import PER_DOP, FittedCost
from loong_jax.cost.work import DecodeWork, PrefillWork, predicted_s

Timed = tuple[PrefillWork | DecodeWork, float]
"""What a step had to do, and the seconds it took."""

MIN_STEPS = 8
_HOLD = 0.02  # of the steps: the weight with which a coefficient is held
_LEAST, _MOST = 0.1, 10.0  # of a coefficient, in one refit
_OUTLIER = 3.0  # times the median: a step that waited for something else


def refitted(cost: FittedCost, groups: Iterable[Sequence[Timed]]) -> dict[str, float]:
    """Coefficients to update `cost` with; the steps of a group are of one phase and DoP. Groups of too few steps change
    nothing; a DoP that `cost` only interpolated gets coefficients of its own."""
    changed: dict[str, float] = {}
    for steps in groups:
        changed.update(_of_group(cost, steps))
    dops = {int(name.partition(".")[2]) for name in changed} - set(cost.dops)
    return {**{f"{name}.{dop}": cost.at(name, dop) for dop in sorted(dops) for name in PER_DOP}, **changed}


def _of_group(cost: FittedCost, steps: Sequence[Timed]) -> dict[str, float]:
    kept = _usual(cost, steps)
    if len(kept) < MIN_STEPS:
        return {}
    dop = kept[0][0].dop
    level = _level(cost, kept)
    names = sorted({name for work, _ in kept for name in _terms(cost, work)})
    old = [min(max(level, _LEAST), _MOST) * cost.at(name, dop) for name in names]
    rows: list[list[float]] = []
    for work, seconds in kept:
        terms = _terms(cost, work)
        rows.append([terms.get(name, 0.0) * value / seconds for name, value in zip(names, old, strict=True)])
    hold = (_HOLD * len(rows)) ** 0.5
    held = [[hold * (i == j) for j in range(len(names))] for i in range(len(names))]
    targets = [1.0] * len(rows) + [hold] * len(names)
    factors = fit.nonnegative([*rows, *held], targets, [_LEAST] * len(names))
    return {
        f"{name}.{dop}": value * min(factor, _MOST) for name, value, factor in zip(names, old, factors, strict=True)
    }


def errors(cost: FittedCost, steps: Sequence[Timed]) -> list[float]:
    """Relative and signed: 0.1 is a prediction 10% too long."""
    return [predicted_s(cost, work) / seconds - 1 for work, seconds in steps]


def _usual(cost: FittedCost, steps: Sequence[Timed]) -> list[Timed]:
    positive = [(work, seconds) for work, seconds in steps if seconds > 0 and predicted_s(cost, work) > 0]
    if not positive:
        return []
    level = _level(cost, positive)
    ratios = [seconds / predicted_s(cost, work) / level for work, seconds in positive]
    return [step for step, ratio in zip(positive, ratios, strict=True) if 1 / _OUTLIER < ratio < _OUTLIER]


def _level(cost: FittedCost, steps: Sequence[Timed]) -> float:
    """By how much steps took longer than predicted, in the median."""
    return median(seconds / predicted_s(cost, work) for work, seconds in steps)


def _terms(cost: FittedCost, work: PrefillWork | DecodeWork) -> dict[str, float]:
    if isinstance(work, PrefillWork):
        return cost.prefill_terms(work.dop, work.tokens, work.pairs, work.context, work.form)
    return cost.decode_terms(work.dop, work.rows, work.rows_per_master, work.kv_tokens)
