"""The policies' cost model: its formula, what lies between known DoPs, and what it refuses."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_jax.config import LadderConfig
from loong_jax.cost.fitted import GLOBAL, PER_DOP, FittedCost
from loong_jax.types import ContextForm

RING, GATHER_Q = ContextForm.RING, ContextForm.GATHER_Q


def coefficients(*dops: int, **given: float) -> dict[str, float]:
    """All zero, but those given, as in prefill_token_s=1.0 for every DoP."""
    out = {f"{name}.{dop}": given.get(name, 0.0) for name in PER_DOP for dop in dops}
    return {**out, **{name: given.get(name, 0.0) for name in GLOBAL}}


def test_prefill_terms_one_by_one() -> None:
    assert FittedCost(coefficients(2, prefill_base_s=3.0)).prefill_s(2, 9, 9, 9, RING) == 3
    assert FittedCost(coefficients(2, prefill_pair_s=3.0)).prefill_s(2, 9, 5.5, 9, RING) == 16.5
    tokens = FittedCost(coefficients(2, prefill_token_s=2.0, prefill_weights_s=10.0))
    assert (tokens.prefill_s(2, 4, 0, 0, RING), tokens.prefill_s(2, 6, 0, 0, RING)) == (10, 12)
    context = FittedCost(coefficients(2, prefill_pair_s=1.0, prefill_context_token_s=8.0))
    assert (context.prefill_s(2, 4, 40, 10, RING), context.prefill_s(2, 16, 160, 10, RING)) == (80, 160)
    forms = FittedCost(coefficients(2, prefill_ring_token_s=1.0, prefill_gather_token_s=2.0))
    assert (forms.prefill_s(2, 3, 0, 100, RING), forms.prefill_s(2, 3, 0, 100, GATHER_Q)) == (100, 6)
    assert forms.prefill_s(2, 3, 0, 0, GATHER_Q) == 0  # no context: nothing to gather


def test_decode_and_migration_terms_one_by_one() -> None:
    assert FittedCost(coefficients(2, decode_base_s=3.0)).decode_s(2, 9, 9, 9) == 3
    assert FittedCost(coefficients(2, decode_row_s=3.0)).decode_s(2, 9, 5, 7) == 27
    assert FittedCost(coefficients(2, decode_master_row_s=3.0)).decode_s(2, 9, 5, 7) == 15
    assert FittedCost(coefficients(2, decode_kv_token_s=3.0)).decode_s(2, 9, 5, 7) == 21
    masters = FittedCost(coefficients(2, decode_masters_s=3.0))
    assert (masters.decode_s(2, 9, 5, 7), masters.decode_s(2, 9, 9, 7)) == (3, 0)
    assert FittedCost(coefficients(1, migrate_base_s=1.0, migrate_token_s=2.0)).migrate_s(5) == 11


def test_between_known_dops() -> None:
    known = coefficients(2, 4)
    known.update({"prefill_base_s.2": 1.0, "prefill_base_s.4": 3.0, "prefill_token_s.2": 6.0, "prefill_token_s.4": 3.0})
    cost = FittedCost(known)
    assert cost.at("prefill_base_s", 3) == pytest.approx(2.0)  # a hop more
    assert cost.at("prefill_token_s", 3) == pytest.approx(4.0)  # 12 shared out over 3
    assert cost.prefill_s(3, 10, 0, 0, RING) == pytest.approx(42)


def test_beyond_known_dops_nothing_is_promised() -> None:
    known = coefficients(2, 4)
    known.update({"prefill_token_s.2": 6.0, "prefill_token_s.4": 3.0})
    cost = FittedCost(known)
    assert (cost.at("prefill_token_s", 1), cost.at("prefill_token_s", 8)) == (6.0, 3.0)
    assert cost.dops == (2, 4)


def test_updated_is_another_value() -> None:
    cost = FittedCost(coefficients(1, 2, prefill_token_s=1.0))
    assert cost.prefill_s(1, 5, 0, 0, RING) == 5
    later = cost.updated({"prefill_token_s.1": 2.0})
    assert (later.prefill_s(1, 5, 0, 0, RING), cost.prefill_s(1, 5, 0, 0, RING)) == (10, 5)


@pytest.mark.parametrize("name", ["prefill_token_s", "prefill_token_s.0", "prefill_token_s.04", "token_s.1", "x", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: no such"):
        FittedCost({**coefficients(1), name: 1.0})


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan")])
def test_values_that_are_no_time_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"decode_row_s\.1"):
        FittedCost({**coefficients(1), "decode_row_s.1": value})


def test_what_is_missing_is_named() -> None:
    known = coefficients(1, 2)
    del known["decode_row_s.2"]
    with pytest.raises(ValueError, match=r"decode_row_s\.2: missing"):
        FittedCost(known)
    with pytest.raises(ValueError, match="no coefficient for any DoP"):
        FittedCost({"migrate_base_s": 0.0, "migrate_token_s": 0.0})


def test_on_a_ladder_steps_take_what_their_bucket_takes() -> None:
    ladder = LadderConfig(dops=(1, 2), prefill_tokens=(16, 64), decode_rows=(4, 8))
    cost = FittedCost(coefficients(2, prefill_token_s=1.0, decode_master_row_s=1.0), ladder)
    assert [cost.prefill_s(2, n, 0, 0, RING) for n in (1, 32, 33, 128, 500)] == [32, 32, 128, 128, 500]
    assert [cost.decode_s(2, 9, n, 0) for n in (1, 4, 5, 9)] == [4, 4, 8, 9]
    assert cost.updated({"prefill_token_s.2": 2.0}).prefill_s(2, 1, 0, 0, RING) == 64


@given(
    st.integers(1, 5),
    st.integers(1, 5000),
    st.integers(0, 5000),
    st.sampled_from(list(ContextForm)),
    st.integers(1, 64),
    st.integers(1, 64),
    st.randoms(use_true_random=False),
)
def test_terms_times_coefficients_are_the_prediction(
    dop: int, new: int, resident: int, form: ContextForm, masters: int, rows: int, rng: random.Random
) -> None:
    known = {name: rng.random() for name in coefficients(1, 4)}
    cost = FittedCost(known, LadderConfig(dops=(1, 2)) if rng.random() < 0.5 else None)
    pairs = new * (new / 2 + resident)
    for terms, seconds in (
        (cost.prefill_terms(dop, new, pairs, resident, form), cost.prefill_s(dop, new, pairs, resident, form)),
        (cost.decode_terms(dop, rows, -(-rows // masters), new), cost.decode_s(dop, rows, -(-rows // masters), new)),
    ):
        assert sum(cost.at(name, dop) * amount for name, amount in terms.items()) == pytest.approx(seconds)
