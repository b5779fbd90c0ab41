"""The linear cost model has the right shape, and its coefficients are data."""

from __future__ import annotations

import pytest

from loong_jax.cost import row_pairs
from loong_jax.cost.linear import DEFAULTS, LinearCost
from loong_jax.types import ContextForm

RING, GATHER_Q = ContextForm.RING, ContextForm.GATHER_Q


def prefill_s(cost: LinearCost, dop: int, new: int, resident: int, form: ContextForm) -> float:
    """Of one row."""
    return cost.prefill_s(dop, new, row_pairs(new, resident), resident, form)


def test_large_prompts_gain_from_dop_and_small_ones_do_not() -> None:
    cost = LinearCost()
    assert prefill_s(cost, 8, 100_000, 0, RING) < prefill_s(cost, 1, 100_000, 0, RING) / 4
    assert prefill_s(cost, 8, 16, 0, RING) > prefill_s(cost, 1, 16, 0, RING)


def test_small_chunks_over_long_context_gather_q() -> None:
    cost = LinearCost()
    assert prefill_s(cost, 4, 512, 500_000, GATHER_Q) < prefill_s(cost, 4, 512, 500_000, RING)
    assert prefill_s(cost, 4, 8192, 512, RING) < prefill_s(cost, 4, 8192, 512, GATHER_Q)


def test_many_short_rows_cost_less_than_a_long_one() -> None:
    cost = LinearCost()
    short_s = cost.prefill_s(2, 10_000, 100 * row_pairs(100, 0), 0, RING)
    assert short_s < cost.prefill_s(2, 10_000, row_pairs(10_000, 0), 0, RING)


def test_decode_grows_with_rows_and_kv() -> None:
    cost = LinearCost()
    base_s = cost.decode_s(2, 8, 4, 1000)
    assert base_s < cost.decode_s(2, 8, 8, 1000)  # fewer masters
    assert base_s < cost.decode_s(2, 16, 4, 1000)  # more to exchange
    assert base_s < cost.decode_s(2, 8, 4, 1_000_000)
    assert cost.decode_s(1, 8, 8, 1000) == pytest.approx(cost.decode_s(1, 80, 8, 1000))  # alone: no exchange


def test_moving_kv_takes_time() -> None:
    cost = LinearCost()
    assert 0 < cost.migrate_s(0) < cost.migrate_s(1000)


def test_coefficients_are_data() -> None:
    cost = LinearCost({"decode_row_s": 1.0})
    later = cost.updated({"decode_base_s": 2.0})
    assert (later.coefficients["decode_row_s"], later.coefficients["decode_base_s"]) == (1.0, 2.0)
    assert cost.coefficients["decode_base_s"] == DEFAULTS["decode_base_s"]
    with pytest.raises(ValueError, match="decode_rows_s"):
        cost.updated({"decode_rows_s": 1.0})
