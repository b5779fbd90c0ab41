"""Cost models of named hardware and models, for the simulator and for policies that nobody has profiled yet.

A800 with the 7B shape is the published LoongServe: the roofline as calibrated on its measurements and, where a
configuration (dop, tp) was measured itself, the fit of that configuration on top; DoPs of the same tp that were not
are scaled alike, so that neighbours agree. Everything else is a roofline with the efficiencies of current kernels,
which are assumptions: `loong profile` replaces them by measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from loong_jax.config import ModelConfig
from loong_jax.cost import calibration, fit, row_pairs
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.hardware import hardware as hardware_named
from loong_jax.cost.measured_a800 import FIGURE_3
from loong_jax.cost.roofline import Efficiency, Roofline, linearised, shape_of

MODERN = Efficiency(
    prefill_launch_s=1e-3,
    prefill_ring_step_s=10e-6,
    prefill_linear=1.35,  # 74% of peak: ragged paged attention's serving figure on tpu7x, Mosaic GPU matmuls
    prefill_attention=1.5,  # 67%: FlashAttention-3 reaches 75% alone
    prefill_link=0.5,  # half of the ring hidden behind attention
    decode_launch_s=0.5e-3,
    decode_weights=1.2,  # 83% of the memory's rate; ragged paged attention reaches 86%
    decode_kv=1.2,
    decode_rows=1.4,
    decode_exchange=1.0,
    migrate_launch_s=0.2e-3,
    migrate_link=1.2,
)
"""Assumed of kernels of 2025; the sources are beside the figures. Nothing of it was measured with Loong."""


def _llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position=1 << 20,
        dtype="bfloat16",
    )


MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "lwm-7b": calibration.LLAMA_2_7B,
        "llama-3.1-8b": _llama(128_256, 4096, 14_336, 32, 32, 8),
        "llama-3.1-70b": _llama(128_256, 8192, 28_672, 80, 64, 8),
    }
)
"""Shapes by name, for the simulator."""

MAX_INSTANCES = 1024


def cost_for(
    hardware: str = "A800", model: str | ModelConfig = "lwm-7b", tp: int = 2, instances: int = 4
) -> FittedCost:
    """Predictions for groups of up to `instances` instances of `tp` devices. Raises ValueError for names that are not
    known and for sizes that make no sense."""
    if not 1 <= instances <= MAX_INSTANCES:
        raise ValueError(f"instances: {instances} is not from 1 to {MAX_INSTANCES}")
    if tp < 1:
        raise ValueError(f"tp: {tp} is not positive")
    return _cost_for(hardware, model_named(model), tp, instances)


def model_named(model: str | ModelConfig) -> ModelConfig:
    """Raises ValueError that lists the names there are."""
    if isinstance(model, ModelConfig):
        return model
    if model not in MODELS:
        raise ValueError(f"model: {model!r} is none of {', '.join(MODELS)}")
    return MODELS[model]


def kv_capacity_tokens(hardware: str, model: str | ModelConfig, tp: int, share: float = 0.9) -> int:
    """Tokens of KV that an instance of `tp` devices holds beside its weights, in `share` of its memory. Raises
    ValueError when the weights alone do not fit."""
    peaks, shape = hardware_named(hardware), shape_of(model_named(model))
    left = share * tp * peaks.hbm_bytes - shape.weight_bytes - shape.head_params * shape.value_bytes
    if left < shape.kv_token_bytes:
        raise ValueError(f"tp: the weights do not fit into {tp} x {peaks.name}")
    return int(left / shape.kv_token_bytes)


@cache
def _cost_for(name: str, model: ModelConfig, tp: int, instances: int) -> FittedCost:
    peaks, shape = hardware_named(name), shape_of(model)
    published = peaks.name == "A800" and shape == shape_of(calibration.LLAMA_2_7B)
    efficiency = calibration.a800() if published else MODERN
    dops = range(1, instances + 1)
    coefficients = linearised(Roofline(peaks, shape, tp), efficiency, dops)
    if published:
        factors = measured_factors(tp)
        for dop in dops:
            for name, factor in factors.items():
                coefficients[f"{name}.{dop}"] *= factor
    return FittedCost(coefficients)


def measured_factors(tp: int) -> dict[str, float]:
    """What the fit of the measured configuration of this `tp` says beside the roofline: by how much its B (per token)
    and C (per pair) differ. Empty where no configuration of it was measured."""
    points = [m for m in FIGURE_3 if m.tp == tp]
    if not points:
        return {}
    dop = points[0].sp
    ideal = linearised(calibration.roofline(tp), calibration.a800(), (dop,))
    base_s = ideal[f"prefill_base_s.{dop}"]
    rows = [[m.batch * m.length, m.batch * row_pairs(m.length, 0)] for m in points]
    seconds = [m.prefill_ms / 1e3 for m in points]
    scaled = [[x / s for x in row] for row, s in zip(rows, seconds, strict=True)]
    token_s, pair_s = fit.nonnegative(scaled, [1 - base_s / s for s in seconds])
    return {
        "prefill_token_s": token_s / ideal[f"prefill_token_s.{dop}"],
        "prefill_pair_s": pair_s / ideal[f"prefill_pair_s.{dop}"],
    }
