"""Building blocks of a decoder: linear maps, RMSNorm, rotary embedding, SwiGLU.

What it is: small pure functions on arrays. Precision is explicit: matmuls accumulate in float32 and return float32,
norms and rotary embedding compute in float32 whatever the dtype of the weights; callers round once, at the end.
What it is not: attention, which is an argument of the model (`decoder.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from loong_jax.config import RopeConfig


def linear(x: Float[Array, "*rows d_in"], weight: Float[Array, "d_in d_out"]) -> Float32[Array, "*rows d_out"]:
    """`x @ weight`, accumulated and returned in float32 (float32 inputs are never rounded to bfloat16 on TPU)."""
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.matmul(x.astype(weight.dtype), weight, precision=precision, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "*rows d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*rows d"]:
    """Root-mean-square norm in float32, rounded to the weight's dtype."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * weight.astype(jnp.float32)).astype(weight.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position of each of the `head_dim / 2` rotated pairs, float32.

    float32 arithmetic on purpose: a rounding other than the reference implementation's is multiplied by the position.
    "llama3" keeps high frequencies, divides low ones by `factor`, and blends linearly in between.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(rope.theta), exponent)
    if rope.kind == "default":
        return frequencies
    assert rope.kind == "llama3", rope.kind
    wavelengths = 2 * np.pi / frequencies
    turns = rope.original_max_position / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)


def rotate(
    x: Float[Array, "tok head dim"],
    positions: Int[Array, " tok"],
    frequencies: np.ndarray,
) -> Float32[Array, "tok head dim"]:
    """Rotary embedding, "half" layout: the pair of lane i is lane i + dim / 2."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def swiglu(gate_up: Float32[Array, "tok two_ff"]) -> Float32[Array, "tok ff"]:
    """`silu(gate) * up` for the fused projection `[gate | up]`."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
