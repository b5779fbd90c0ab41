"""The cost model before any measurement has the right shape."""

from __future__ import annotations

import pytest

from loong_jax.config import LadderConfig
from loong_jax.cost import row_pairs
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.unmeasured import DEFAULTS, unmeasured
from loong_jax.types import ContextForm

RING, GATHER_Q = ContextForm.RING, ContextForm.GATHER_Q


def prefill_s(cost: FittedCost, dop: int, new: int, resident: int, form: ContextForm) -> float:
    """Of one row."""
    return cost.prefill_s(dop, new, row_pairs(new, resident), resident, form)


def test_large_prompts_gain_from_dop_and_small_ones_do_not() -> None:
    cost = unmeasured()
    assert prefill_s(cost, 8, 100_000, 0, RING) < prefill_s(cost, 1, 100_000, 0, RING) / 4
    assert prefill_s(cost, 8, 16, 0, RING) > prefill_s(cost, 1, 16, 0, RING)


def test_small_chunks_over_long_context_gather_q() -> None:
    cost = unmeasured()
    assert prefill_s(cost, 4, 512, 500_000, GATHER_Q) < prefill_s(cost, 4, 512, 500_000, RING)
    assert prefill_s(cost, 4, 8192, 512, RING) < prefill_s(cost, 4, 8192, 512, GATHER_Q)


def test_many_short_rows_cost_less_than_a_long_one() -> None:
    cost = unmeasured()
    short_s = cost.prefill_s(2, 10_000, 100 * row_pairs(100, 0), 0, RING)
    assert short_s < cost.prefill_s(2, 10_000, row_pairs(10_000, 0), 0, RING)


def test_decode_grows_with_rows_and_kv() -> None:
    cost = unmeasured()
    base_s = cost.decode_s(2, 8, 4, 1000)
    assert base_s < cost.decode_s(2, 8, 8, 1000)  # fewer masters
    assert base_s < cost.decode_s(2, 16, 4, 1000)  # more to exchange
    assert base_s < cost.decode_s(2, 8, 4, 1_000_000)
    assert 0 < cost.migrate_s(0) < cost.migrate_s(1000)


@pytest.mark.parametrize("dop", [1, 2, 3, 8, 64])
def test_two_dops_say_it_of_all(dop: int) -> None:
    c, cost = DEFAULTS, unmeasured()
    assert cost.at("prefill_base_s", dop) == pytest.approx(c["prefill_base_s"] + c["prefill_hop_s"] * (dop - 1))
    assert cost.at("prefill_pair_s", dop) == pytest.approx(c["prefill_pair_s"] / dop, rel=1e-4)
    assert cost.at("prefill_ring_token_s", dop) == pytest.approx(c["ring_token_s"] * (dop - 1) / dop)


def test_changed_values_and_the_ladder_arrive() -> None:
    cost = unmeasured(LadderConfig(), decode_base_s=0.5)
    assert cost.decode_s(1, 1, 1, 0) == pytest.approx(0.5, abs=1e-3)
    assert cost.prefill_s(1, 1, 0, 0, RING) == cost.prefill_s(1, 128, 0, 0, RING)  # one bucket
    with pytest.raises(ValueError, match="decode_rows_s"):
        unmeasured(decode_rows_s=1.0)
