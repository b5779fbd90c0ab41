"""`flash_partial` in blocks of pure JAX: for CPU, and for every platform that has no kernel yet.

Queries and keys are cut into blocks. From (request, position) summaries of the blocks follows which key blocks each
query block can see at all; only those are computed, so causal prompts, chunks, stripes, ragged batches, padding and
windows cost what they show. The list of blocks is data: one program serves every layout.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_partial.visibility import block_lists, extents, may_see
from pallas_kernels.partial import Partial
from pallas_kernels.softmax import finish, fold, start, varying_zero

Q_ROWS = 512
"""Rows of a score tile: block_q * (heads per KV head)."""
KV_BLOCK = 256


def _blocks(a: Array, size: int, fill: int) -> Array:
    """`[tok, ...]` to `[block, size, ...]`, the last block filled up."""
    num_blocks = -(-a.shape[0] // size)
    a = jnp.pad(a, [(0, num_blocks * size - a.shape[0])] + [(0, 0)] * (a.ndim - 1), constant_values=fill)
    return a.reshape(num_blocks, size, *a.shape[1:])


def block_size(limit: int, num_tokens: int) -> int:
    """At most `limit` (16 or more), a multiple of 8; as even as blocks can be, so that the last one is no padding."""
    num_blocks = max(1, -(-num_tokens // max(limit, 16)))
    return max(16, -(-num_tokens // (8 * num_blocks)) * 8)


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
    q_rows: int = Q_ROWS,
    kv_block: int = KV_BLOCK,
) -> Partial:
    """See `pallas_kernels.flash_partial`. `q_rows`, `kv_block`: sizes of a score tile."""
    num_tokens, num_heads, dim = q.shape
    kvh = k.shape[1]
    group = num_heads // kvh
    bq, bk = block_size(q_rows // group, num_tokens), block_size(kv_block, k.shape[0])
    zero = varying_zero(q, k, v, q_req, q_pos, kv_req, kv_pos)

    present = (kv_req >= 0)[:, None, None]
    qs = _blocks(q, bq, 0).reshape(-1, bq, kvh, group, dim).transpose(0, 2, 3, 1, 4).reshape(-1, kvh, group * bq, dim)
    ks = _blocks(k, bk, 0).transpose(0, 2, 1, 3)
    vs = _blocks(jnp.where(present, v, 0), bk, 0).transpose(0, 2, 1, 3)  # 0 * NaN is NaN: padding must be 0
    q_reqs, q_poss = _blocks(q_req, bq, -1), _blocks(q_pos, bq, -1)
    kv_reqs, kv_poss = _blocks(kv_req, bk, -1), _blocks(kv_pos, bk, -1)
    lists, counts = block_lists(may_see(extents(q_reqs, q_poss), extents(kv_reqs, kv_poss), window))

    def one_q_block(block: tuple[Array, ...]) -> Partial:
        qi, req, pos, kv_blocks, count = block

        def one_kv_block(step: Array, running):
            j = kv_blocks[step]
            visible = (req[:, None] == kv_reqs[j]) & (req >= 0)[:, None] & (kv_poss[j] <= pos[:, None])
            if window is not None:
                visible &= pos[:, None] - kv_poss[j] < window
            return fold(running, qi, ks[j], vs[j], jnp.tile(visible, (group, 1)), scale=scale, soft_cap=soft_cap)

        return finish(lax.fori_loop(0, count, one_kv_block, start((kvh, group * bq), dim, zero)), bq)

    out, lse = lax.map(one_q_block, (qs, q_reqs, q_poss, lists, counts))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_tokens], Partial(out, lse))
