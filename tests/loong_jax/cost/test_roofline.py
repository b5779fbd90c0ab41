"""The roofline's terms against figures worked out by hand, and its linear form against itself."""

from __future__ import annotations

import pytest

from loong_jax.cost import row_pairs
from loong_jax.cost.calibration import LLAMA_2_7B, a800
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.hardware import HARDWARE
from loong_jax.cost.roofline import Roofline, linearised, shape_of
from loong_jax.types import ContextForm

RING, GATHER_Q = ContextForm.RING, ContextForm.GATHER_Q
SHAPE = shape_of(LLAMA_2_7B)
A800 = Roofline(HARDWARE["A800"], SHAPE, 2)


def test_the_shape_of_llama_2_7b() -> None:
    assert SHAPE.kv_token_bytes == 512 * 1024  # as the paper says
    assert SHAPE.linear_params + SHAPE.head_params == pytest.approx(6.607e9, rel=1e-3)


def test_terms_by_hand() -> None:
    assert A800.weights_hbm_s() == pytest.approx(13.21e9 / 2 / 2.039e12, rel=1e-3)
    assert A800.kv_hbm_s(1000) == pytest.approx(1000 * 524288 / 2 / 2.039e12)
    assert A800.prefill_linear_math_s(4, 8000) == pytest.approx(2 * 6.476e9 * 8000 / 8 / 312e12, rel=1e-3)
    assert A800.prefill_attention_math_s(4, 1e9) == pytest.approx(4 * 32 * 4096 * 1e9 / 8 / 312e12)
    assert A800.reduce_link_s(100) == pytest.approx(2 * 32 * 100 * 4096 * 2 / 200e9)  # 2 (tp - 1) / tp = 1
    assert A800.decode_rows_math_s(128) == pytest.approx(2 * 6.607e9 * 128 / 2 / 312e12, rel=1e-3)


def test_alone_nothing_travels_between_instances() -> None:
    assert A800.exchange_link_s(1, 100) == 0
    assert A800.prefill_context_link_s(1, 100, 1000, RING) == 0
    single = Roofline(HARDWARE["A800"], SHAPE, 1)
    assert single.reduce_link_s(100) == 0
    assert single.prefill_tokens_link_s(1, 100) == 0
    assert single.decode_latency_s(1, False) == 0


def test_gather_q_moves_the_chunk_and_the_ring_moves_the_context() -> None:
    """DESIGN 5: 512 tokens over 500K of context, 7B MHA on 4 x 2 A800: far less than rotating KV."""
    ring_s = A800.prefill_context_link_s(4, 512, 500_000, RING)
    gather_s = A800.prefill_context_link_s(4, 512, 500_000, GATHER_Q)
    assert ring_s > 100 * gather_s
    assert A800.prefill_context_link_s(4, 512, 1_000_000, GATHER_Q) == gather_s


def test_more_instances_share_math_but_not_decode_weights() -> None:
    e = a800()
    pairs = row_pairs(100_000, 0)
    assert A800.prefill_s(e, 4, 100_000, pairs, 0, RING) < A800.prefill_s(e, 1, 100_000, pairs, 0, RING) / 3
    assert A800.decode_s(e, 4, 1, 1, 1000) > A800.decode_s(e, 1, 1, 1, 1000)


@pytest.mark.parametrize("dop", [1, 2, 4])
@pytest.mark.parametrize(("new", "resident"), [(10, 0), (10_000, 0), (16, 500_000), (512, 100_000), (8192, 8192)])
@pytest.mark.parametrize("form", [RING, GATHER_Q])
def test_the_linear_form_says_the_same_of_prefill(dop: int, new: int, resident: int, form: ContextForm) -> None:
    e, cost = a800(), FittedCost(linearised(A800, a800(), (1, 2, 4)))
    expected = A800.prefill_s(e, dop, new, row_pairs(new, resident), resident, form)
    # The floor of tiny batches takes the links of their tokens in.
    assert cost.prefill_s(dop, new, row_pairs(new, resident), resident, form) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("dop", "rows", "per_master"), [(1, 8, 8), (4, 8, 8), (4, 512, 128), (2, 3, 2)])
def test_the_linear_form_says_the_same_of_decode(dop: int, rows: int, per_master: int) -> None:
    e, cost = a800(), FittedCost(linearised(A800, a800(), (1, 2, 4)))
    expected = A800.decode_s(e, dop, rows, per_master, 50_000)
    assert cost.decode_s(dop, rows, per_master, 50_000) == pytest.approx(expected)
    assert cost.migrate_s(1000) == pytest.approx(e.migrate_launch_s + e.migrate_link * A800.kv_link_s(1000))
