"""Refits follow what steps took, and leave alone what steps do not tell."""

from __future__ import annotations

import random

import pytest

from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.presets import cost_for
from loong_jax.cost.refit import MIN_STEPS, Timed, errors, refitted
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.cost.work import DecodeWork, PrefillWork, predicted_s
from loong_jax.types import ContextForm

TRUTH = cost_for()


def decode_steps(dop: int, num: int, seed: int = 0) -> list[Timed]:
    rng = random.Random(seed)
    rows = [rng.randint(1, 64) for _ in range(num)]
    works = [DecodeWork(dop, n, n, n * rng.randint(100, 20_000)) for n in rows]
    return [(work, predicted_s(TRUTH, work)) for work in works]


def prefill_steps(dop: int, num: int) -> list[Timed]:
    rng = random.Random(1)
    lengths = [rng.randint(100, 20_000) for _ in range(num)]
    works = [PrefillWork(dop, n, n * n / 2, 0, ContextForm.RING) for n in lengths]
    return [(work, predicted_s(TRUTH, work)) for work in works]


def size(cost: FittedCost, steps: list[Timed]) -> float:
    return sum(map(abs, errors(cost, steps))) / len(steps)


def test_a_model_that_knew_nothing_is_right_after_a_few() -> None:
    cost = unmeasured()
    for seed in range(4):
        groups = [decode_steps(2, 64, seed), prefill_steps(2, 64)]
        cost = cost.updated(refitted(cost, groups))
    assert size(cost, decode_steps(2, 64, seed=9)) < 0.05
    assert size(cost, prefill_steps(2, 64)) < 0.1


def test_alike_steps_move_the_level_and_keep_the_shape() -> None:
    work = DecodeWork(2, 8, 8, 40_000)
    steps: list[Timed] = [(work, 3 * predicted_s(TRUTH, work))] * 32
    later = TRUTH.updated(refitted(TRUTH, [steps]))
    assert predicted_s(later, work) == pytest.approx(steps[0][1], rel=0.02)
    for name in ("decode_base_s", "decode_kv_token_s", "decode_master_row_s"):
        assert later.at(name, 2) == pytest.approx(3 * TRUTH.at(name, 2), rel=0.1)
    assert later.prefill_s(2, 999, 1e5, 0, ContextForm.RING) == TRUTH.prefill_s(2, 999, 1e5, 0, ContextForm.RING)
    assert later.decode_s(1, 8, 8, 40_000) == TRUTH.decode_s(1, 8, 8, 40_000)


def test_steps_that_waited_are_no_rule() -> None:
    steps = decode_steps(2, 40)
    for i in range(0, 40, 4):
        steps[i] = (steps[i][0], 20 * steps[i][1])
    later = TRUTH.updated(refitted(TRUTH, [steps]))
    assert size(later, decode_steps(2, 40)) < 0.01


def test_no_refit_runs_away() -> None:
    steps: list[Timed] = [(work, 1e4 * seconds) for work, seconds in decode_steps(1, 32)]
    later = TRUTH.updated(refitted(TRUTH, [steps]))
    for name in ("decode_base_s", "decode_kv_token_s"):
        assert later.at(name, 1) <= 101 * TRUTH.at(name, 1)


def test_too_few_steps_change_nothing() -> None:
    assert refitted(TRUTH, [decode_steps(1, MIN_STEPS - 1)]) == {}
    assert refitted(TRUTH, [[(work, 0.0) for work, _ in decode_steps(1, 32)]]) == {}
    assert refitted(TRUTH, []) == {}


def test_an_interpolated_dop_gets_coefficients_of_its_own() -> None:
    cost = unmeasured()
    later = cost.updated(refitted(cost, [decode_steps(4, 32)]))
    assert later.dops == (1, 4, cost.dops[-1])
    assert later.prefill_s(4, 999, 1e5, 0, ContextForm.RING) == pytest.approx(
        cost.prefill_s(4, 999, 1e5, 0, ContextForm.RING)
    )


def test_the_same_steps_give_the_same_bits() -> None:
    assert refitted(TRUTH, [decode_steps(2, 64)]) == refitted(TRUTH, [decode_steps(2, 64)])
