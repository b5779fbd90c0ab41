"""The reference of `flash_partial`: the definition, densely, in float32. Slow and big on purpose."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.partial import NEG, Partial


def flash_partial(
    q: Float[Array, "tok head dim"],
    k: Float[Array, "ctx kvh dim"],
    v: Float[Array, "ctx kvh dim"],
    q_req: Int[Array, " tok"],
    q_pos: Int[Array, " tok"],
    kv_req: Int[Array, " ctx"],
    kv_pos: Int[Array, " ctx"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """See `pallas_kernels.flash_partial`."""
    group = q.shape[1] // k.shape[1]
    present = (kv_req >= 0)[:, None, None]
    k = jnp.repeat(jnp.where(present, k, 0).astype(jnp.float32), group, axis=1)
    v = jnp.repeat(jnp.where(present, v, 0).astype(jnp.float32), group, axis=1)  # 0 * NaN is NaN: padding must be 0

    visible = (q_req[:, None] == kv_req[None, :]) & (kv_req >= 0)[None, :] & (kv_pos[None, :] <= q_pos[:, None])
    if window is not None:
        visible &= q_pos[:, None] - kv_pos[None, :] < window

    score = jnp.einsum("thd,shd->hts", q.astype(jnp.float32), k, precision=lax.Precision.HIGHEST) * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(visible, score, NEG)
    top = score.max(axis=-1, keepdims=True)
    weight = jnp.where(visible, jnp.exp(score - top), 0.0)
    total = weight.sum(axis=-1)  # [head, tok]
    out = jnp.einsum("hts,shd->thd", weight, v, precision=lax.Precision.HIGHEST)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny).T[..., None]
    lse = jnp.where(total > 0, top[..., 0] + jnp.log(total), NEG)
    return Partial(out, lse.T)
