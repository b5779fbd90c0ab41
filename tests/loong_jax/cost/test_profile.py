"""The plan of a profile stays within its bounds, and its fit finds the model behind the measurements."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_jax.config import ClusterConfig, LadderConfig, ladder_for
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.presets import cost_for
from loong_jax.cost.profile import MAX_BATCHES, Batch, Measurement, batches, chosen_dops, fitted, work_of
from loong_jax.cost.work import predicted_s
from loong_jax.types import ContextForm

LADDER = ladder_for(4)
CLUSTER = ClusterConfig(num_instances=4, pages_per_instance=4096, ladder=LADDER)


def measure(cost: FittedCost, chosen: list[Batch], noise: float = 0.0) -> list[Measurement]:
    rng = random.Random(0)
    works = [work_of(batch) for batch in chosen]
    return [
        Measurement(batch, work, predicted_s(cost, work) * (1 + noise * rng.uniform(-1, 1)))
        for batch, work in zip(chosen, works, strict=True)
    ]


@given(
    num_instances=st.integers(1, 64),
    page_tokens=st.sampled_from([1, 16, 128]),
    pages=st.integers(1, 10_000),
    slots=st.integers(1, 300),
    data=st.data(),
)
def test_a_plan_fits_the_engine(num_instances: int, page_tokens: int, pages: int, slots: int, data) -> None:
    sizes = data.draw(st.lists(st.sampled_from([128, 512, 2048, 8192]), min_size=1, unique=True))
    decode = data.draw(st.lists(st.sampled_from([1, 8, 32, 128]), min_size=1, unique=True))
    ladder = ladder_for(
        num_instances, LadderConfig(prefill_tokens=tuple(sorted(sizes)), decode_rows=tuple(sorted(decode)))
    )
    cluster = ClusterConfig(
        num_instances, page_tokens=page_tokens, pages_per_instance=pages, slots=slots, ladder=ladder,
        ring_tokens=512, query_tile_tokens=128,
    )  # fmt: skip
    chosen = batches(cluster)
    assert 0 < len(chosen) <= MAX_BATCHES
    assert len(set(chosen)) == len(chosen)
    for batch in chosen:
        assert batch.dop in ladder.dops
        assert 1 <= batch.rows <= slots
        assert batch.new >= 1
        if batch.phase == "prefill":
            padded = -(-batch.new // page_tokens) * batch.rows  # pages
            assert batch.rows <= ladder.prefill_rows
            assert -(-padded // batch.dop) * page_tokens <= ladder.prefill_tokens[-1]
        if batch.phase == "decode":
            assert -(-batch.rows // batch.masters) <= ladder.decode_rows[-1]
            assert batch.masters <= batch.dop
        if pages >= 8:  # an engine of a few pages has no room to measure in
            held = batch.rows * -(-(batch.resident + batch.new) // page_tokens)
            assert held <= batch.dop * pages


def test_the_largest_dop_and_one_between_are_measured() -> None:
    assert chosen_dops((1, 2, 3, 4, 8)) == (1, 3, 8)
    assert chosen_dops((1, 2)) == (1, 2)
    assert chosen_dops((1,)) == (1,)


def test_both_forms_of_context_are_measured() -> None:
    forms = {batch.form for batch in batches(CLUSTER) if batch.resident and batch.phase == "prefill" and batch.dop > 1}
    assert forms == set(ContextForm)


def test_the_fit_finds_the_model_behind_the_measurements() -> None:
    truth = FittedCost({**cost_for().coefficients, **no_floors()}, LADDER)
    measured = measure(truth, batches(CLUSTER))
    found = fitted(measured, LADDER)
    assert max(map(abs, found.errors)) < 0.02  # masters have a step of their own in truth
    cost = FittedCost(found.coefficients, LADDER)
    for dop in (1, 2, 3, 4):
        new, resident = 1000 * dop, 20_000
        pairs = new * (new / 2 + resident)
        for form in ContextForm:
            expected = truth.prefill_s(dop, new, pairs, resident, form)
            assert cost.prefill_s(dop, new, pairs, resident, form) == pytest.approx(expected, rel=0.05)
        assert cost.decode_s(dop, 40, 40, 9999) == pytest.approx(truth.decode_s(dop, 40, 40, 9999), rel=0.05)
    assert cost.migrate_s(5000) == pytest.approx(truth.migrate_s(5000))


def no_floors() -> dict[str, float]:
    return {f"{name}.{dop}": 0.0 for name in ("prefill_weights_s", "prefill_context_token_s") for dop in range(1, 5)}


def test_left_out_errors_know_less() -> None:
    truth = FittedCost({**cost_for().coefficients, **no_floors()}, LADDER)
    found = fitted(measure(truth, batches(CLUSTER), noise=0.05), LADDER)
    sizes = [sum(map(abs, errors)) for errors in (found.errors, found.left_out)]
    assert sizes[0] < sizes[1]
    assert max(map(abs, found.errors)) < 0.12


def test_a_batch_reads_well() -> None:
    assert Batch("prefill", 2, 1, 512, 4096, ContextForm.GATHER_Q).name == "prefill 1 x 512 over 4,096 (gather_q)"
    assert Batch("decode", 2, 8, 1, 16, masters=2).name == "decode 8 x 16, 2 masters"
    assert Batch("migrate", 2, 1, 16).name == "migrate 16"
