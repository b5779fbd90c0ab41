"""`paged_partial` in tiles of pages, pure JAX: for CPU, and for every platform that has no kernel yet.

Loops over the rows that have entries, and in each over tiles of its entries: large tiles, then small ones for the
rest. All trip counts are data, so the cost follows the entries present; a tile's pages are gathered, never the pool.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import partial
from pallas_kernels.partial import Partial
from pallas_kernels.softmax import Running, finish, fold, start, varying_zero
from pallas_kernels.storage import K, V, gather_heads

LARGE_TILE_TOKENS = 512
SMALL_TILE_TOKENS = 64


def _live_rows(row_len: Int[Array, " row"]) -> tuple[Int[Array, " row"], Int[Array, ""]]:
    """Indices of the rows with entries, in front, and their number."""
    live = row_len > 0
    num_rows = row_len.shape[0]
    place = jnp.where(live, jnp.cumsum(live) - 1, num_rows)
    return jnp.zeros(num_rows, jnp.int32).at[place].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop"), live.sum()


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
    large_tile_tokens: int = LARGE_TILE_TOKENS,
    small_tile_tokens: int = SMALL_TILE_TOKENS,
) -> Partial:
    """See `pallas_kernels.paged_partial`. `*_tile_tokens`: sizes of a score tile along the context."""
    num_rows, num_q, num_heads, dim = q.shape
    kvh, page_tokens = kv_pages.shape[3:5]
    group, num_entries = num_heads // kvh, entries.shape[0]
    zero = varying_zero(q, q_pos, kv_pages, jnp.asarray(layer), entries, row_start, row_len)
    qs = q.reshape(num_rows, num_q, kvh, group, dim).transpose(0, 2, 3, 1, 4).reshape(num_rows, kvh, -1, dim)

    def fold_tile(running: Running, row: Array, first: Array, tile: int) -> Running:
        """Folds entries `[first, first + tile)` of the row in."""
        index = first + jnp.arange(tile)
        page, position, count = entries[jnp.clip(row_start[row] + index, 0, num_entries - 1)].T
        slot = jnp.arange(page_tokens)
        used = ((slot < count[:, None]) & (index < row_len[row])[:, None]).reshape(-1)
        distance = q_pos[row][:, None] - (position[:, None] + slot).reshape(-1)
        visible = used & (distance >= 0) & (q_pos[row] >= 0)[:, None]
        if window is not None:
            visible &= distance < window
        kv = gather_heads(kv_pages, layer, page, dim)
        v = jnp.where(used[:, None], kv[V], 0)  # 0 * NaN is NaN: unused slots must be 0
        visible = jnp.tile(visible, (group, 1))
        return fold(running, qs[row], kv[K], v, visible, scale=scale, soft_cap=soft_cap)

    def one_row(i: Array, parts: Partial) -> Partial:
        row = rows[i]
        running, first = start(kvh, group * num_q, dim, zero), jnp.zeros((), jnp.int32)
        for tile_tokens in (large_tile_tokens, small_tile_tokens):
            tile = max(1, tile_tokens // page_tokens)
            left = row_len[row] - first
            # The last loop rounds up; the others leave their remainder to it.
            trips = -(-left // tile) if tile_tokens == small_tile_tokens else left // tile
            running = lax.fori_loop(
                0, trips, lambda t, run, first=first, tile=tile: fold_tile(run, row, first + t * tile, tile), running
            )
            first += trips * tile
        part = finish(running, num_q)
        return Partial(parts.out.at[row].set(part.out), parts.lse.at[row].set(part.lse))

    rows, num_live = _live_rows(row_len)
    none = partial.empty(q.shape)
    return lax.fori_loop(0, num_live, one_row, Partial(none.out + zero, none.lse + zero))
