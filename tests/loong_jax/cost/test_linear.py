"""The linear cost model has the right shape, and its coefficients are data."""

from __future__ import annotations

import pytest

from loong_jax.cost.linear import DEFAULTS, LinearCost
from loong_jax.types import ContextForm

RING, GATHER_Q = ContextForm.RING, ContextForm.GATHER_Q


def test_large_prompts_gain_from_dop_and_small_ones_do_not() -> None:
    cost = LinearCost()
    assert cost.prefill_s(8, 100_000, 0, RING) < cost.prefill_s(1, 100_000, 0, RING) / 4
    assert cost.prefill_s(8, 16, 0, RING) > cost.prefill_s(1, 16, 0, RING)


def test_small_chunks_over_long_context_gather_q() -> None:
    cost = LinearCost()
    assert cost.prefill_s(4, 512, 500_000, GATHER_Q) < cost.prefill_s(4, 512, 500_000, RING)
    assert cost.prefill_s(4, 8192, 512, RING) < cost.prefill_s(4, 8192, 512, GATHER_Q)


def test_decode_grows_with_rows_and_kv() -> None:
    cost = LinearCost()
    assert cost.decode_s(1, 8, 1000) < cost.decode_s(1, 16, 1000)
    assert cost.decode_s(1, 8, 1000) < cost.decode_s(1, 8, 1_000_000)


def test_coefficients_are_data() -> None:
    cost = LinearCost({"decode_row_s": 1.0})
    later = cost.updated({"decode_base_s": 2.0})
    assert (later.coefficients["decode_row_s"], later.coefficients["decode_base_s"]) == (1.0, 2.0)
    assert cost.coefficients["decode_base_s"] == DEFAULTS["decode_base_s"]
    with pytest.raises(ValueError, match="decode_rows_s"):
        cost.updated({"decode_rows_s": 1.0})
