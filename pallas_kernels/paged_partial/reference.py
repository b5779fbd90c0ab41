"""The reference of `paged_partial`: every page in the table, densely, through the reference of `flash_partial`'s maths.

Slow and big on purpose: it reads all entries for all rows.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.partial import NEG, Partial
from pallas_kernels.storage import gather_pages


def paged_partial(
    q: Float[Array, "row qtok head dim"],
    q_pos: Int[Array, "row qtok"],
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    entries: Int[Array, "entry 3"],
    row_start: Int[Array, " row"],
    row_len: Int[Array, " row"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """See `pallas_kernels.paged_partial`."""
    num_entries, kvh, page_tokens = entries.shape[0], kv_pages.shape[3], kv_pages.shape[4]
    group = q.shape[2] // kvh
    k, v = gather_pages(kv_pages, layer, entries[:, 0], q.shape[3], jnp.float32)

    entry, slot = jnp.divmod(jnp.arange(num_entries * page_tokens), page_tokens)
    owned = (row_start[:, None] <= entry) & (entry < (row_start + row_len)[:, None])  # [row, ctx]
    used = owned & (slot < entries[entry, 2])
    present = used.any(axis=0)[:, None, None]
    k = jnp.repeat(jnp.where(present, k, 0), group, axis=1)
    v = jnp.repeat(jnp.where(present, v, 0), group, axis=1)  # 0 * NaN is NaN: unused slots must be 0

    distance = q_pos[:, :, None] - (entries[entry, 1] + slot)
    visible = used[:, None, :] & (distance >= 0) & (q_pos >= 0)[:, :, None]  # [row, qtok, ctx]
    if window is not None:
        visible &= distance < window

    score = jnp.einsum("rthd,shd->rths", q.astype(jnp.float32), k, precision=lax.Precision.HIGHEST) * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(visible[:, :, None], score, NEG)
    top = score.max(axis=-1, keepdims=True)
    weight = jnp.where(visible[:, :, None], jnp.exp(score - top), 0.0)
    total = weight.sum(axis=-1)  # [row, qtok, head]
    out = jnp.einsum("rths,shd->rthd", weight, v, precision=lax.Precision.HIGHEST)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return Partial(out, jnp.where(total > 0, top[..., 0] + jnp.log(total), NEG))
