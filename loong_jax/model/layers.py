"""Building blocks of a decoder: linear maps, RMSNorm, the gated activation.

What it is: small pure functions on arrays. Precision is explicit: matmuls accumulate in float32 and return float32,
norms compute in float32 whatever the dtype of the weights; callers round once, at the end.
What it is not: attention, which is an argument of the model (`decoder.py`), or rotary embedding (`rope.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def linear(x: Float[Array, "*rows d_in"], weight: Float[Array, "d_in d_out"]) -> Float32[Array, "*rows d_out"]:
    """`x @ weight`, accumulated and returned in float32 (float32 inputs are never rounded to bfloat16 on TPU)."""
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    # XLA on CPU multiplies one bfloat16 row ten times as slowly as two (docs/cpu_engine.md); a TPU pads rows anyway.
    padded = x.ndim == 2 and x.shape[0] == 1 and weight.dtype == jnp.bfloat16
    rows = jnp.pad(x, ((0, 1), (0, 0))) if padded else x
    out = jnp.matmul(rows.astype(weight.dtype), weight, precision=precision, preferred_element_type=jnp.float32)
    return out[:1] if padded else out


def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, " d"], eps: float, offset: float = 0.0
) -> Float[Array, "*rows d"]:
    """Root-mean-square norm in float32, times `offset + weight`, rounded to the weight's dtype."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * (offset + weight.astype(jnp.float32))).astype(weight.dtype)


def gated(gate_up: Float32[Array, "tok two_ff"], activation: str) -> Float32[Array, "tok ff"]:
    """`activation(gate) * up` for the fused projection `[gate | up]`; "silu" or "gelu_tanh"."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
