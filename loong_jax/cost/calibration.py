"""The roofline's efficiencies of the published LoongServe on A800, from the few dozen batches of `measured_a800.py`.

Features are fixed by physics, before any number is seen: launches, linear math, attention, links for prefill;
launch, weight bytes, KV bytes of the fullest instance, rows of the fullest master, exchange for decode. One coefficient
each for all configurations (sp, tp) together, so that those which nobody measured follow from those which were.
What it is not: the model of one configuration (`presets.py` puts the fit of that on top where there is one).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from loong_jax.config import ModelConfig
from loong_jax.cost import fit, row_pairs
from loong_jax.cost.hardware import HARDWARE
from loong_jax.cost.measured_a800 import FIGURE_3, FIGURE_14B, SMALL, Masters, Measured
from loong_jax.cost.roofline import Efficiency, Roofline, shape_of
from loong_jax.types import ContextForm

LLAMA_2_7B = ModelConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position=1 << 20,
    dtype="bfloat16",
)
"""Also LWM-Text-1M, the model of the paper."""

_DECODE_LEAST = (0.0, 1.0, 1.0, 1.0, 0.0)
"""Of launch, weights, KV, rows, exchange."""

_GAUSS_NEWTON = 12  # rounds for the ratios; they settle within five


def roofline(tp: int) -> Roofline:
    return Roofline(HARDWARE["A800"], shape_of(LLAMA_2_7B), tp)


def prefill_features(m: Measured) -> list[float]:
    ideal, tokens = roofline(m.tp), m.batch * m.length
    return [
        1.0,
        float(ideal.shape.num_layers * (m.sp - 1)),
        max(ideal.prefill_linear_math_s(m.sp, tokens), ideal.weights_hbm_s()),
        ideal.prefill_attention_math_s(m.sp, m.batch * row_pairs(m.length, 0)),
        ideal.prefill_tokens_link_s(m.sp, tokens),
    ]


def decode_features(sp: int, tp: int, batch: int, length: int, masters: int) -> list[float]:
    ideal, rows_per_master = roofline(tp), -(-batch // masters)
    return [
        1.0,
        ideal.weights_hbm_s(),
        ideal.kv_hbm_s(batch * length / sp),
        ideal.decode_rows_math_s(rows_per_master),
        ideal.decode_latency_s(sp, masters > 1)
        + ideal.reduce_link_s(rows_per_master)
        + ideal.exchange_link_s(sp, batch),
    ]


def fit_decode(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Relative least squares of measured times and of the ratios of figure 14b, which are no sums of terms: they are
    taken linearly around the last round's coefficients. Nothing is faster than memory and arithmetic at their peak."""
    pairs = [(_ratio_features(m, m.masters), _ratio_features(m, 1), m.ratio) for m in FIGURE_14B]
    scaled = [[x / s for x in row] for row, s in zip(rows, seconds, strict=True)]
    coefficients = fit.relative(rows, seconds)
    for _ in range(_GAUSS_NEWTON):
        ratios: list[list[float]] = []
        for several, one, ratio in pairs:
            scale = ratio * fit.predicted([one], coefficients)[0]
            ratios.append([(a - ratio * b) / scale for a, b in zip(several, one, strict=True)])
        targets = [1.0] * len(scaled) + [0.0] * len(ratios)
        coefficients = fit.nonnegative([*scaled, *ratios], targets, _DECODE_LEAST)
    return coefficients


def _ratio_features(m: Masters, masters: int) -> list[float]:
    return decode_features(4, 2, m.batch, m.length, masters)


def fit_efficiency(points: Sequence[Measured]) -> Efficiency:
    """From `points`, and always the small batches and the ratios."""
    measured = [*points, *SMALL]
    launch_s, ring_step_s, linear, attention, link = fit.relative(
        [prefill_features(m) for m in measured], [m.prefill_ms / 1e3 for m in measured]
    )
    decode_launch_s, weights, kv, rows, exchange = fit_decode(
        [decode_features(m.sp, m.tp, m.batch, m.length, m.masters) for m in measured],
        [m.decode_ms / 1e3 for m in measured],
    )
    return Efficiency(
        prefill_launch_s=launch_s,
        prefill_ring_step_s=ring_step_s,
        prefill_linear=linear,
        prefill_attention=attention,
        prefill_link=link,
        decode_launch_s=decode_launch_s,
        decode_weights=weights,
        decode_kv=kv,
        decode_rows=rows,
        decode_exchange=exchange,
        # A migration was not measured: a launch as in a ring step of each layer, and links as in prefill.
        migrate_launch_s=ring_step_s * shape_of(LLAMA_2_7B).num_layers,
        migrate_link=link,
    )


@cache
def a800() -> Efficiency:
    return fit_efficiency(FIGURE_3)


def prefill_predicted_s(e: Efficiency, m: Measured) -> float:
    pairs = m.batch * row_pairs(m.length, 0)
    return roofline(m.tp).prefill_s(e, m.sp, m.batch * m.length, pairs, 0, ContextForm.RING)


def decode_predicted_s(e: Efficiency, m: Measured) -> float:
    rows_per_master = -(-m.batch // m.masters)
    return roofline(m.tp).decode_s(e, m.sp, m.batch, rows_per_master, m.batch * m.length / m.sp)
