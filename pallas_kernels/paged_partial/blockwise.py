"""`paged_partial` in tiles of pages, pure JAX: for CPU, and for every platform that has no kernel yet.

The rows' entries are cut into tiles, and one loop goes over the tiles of all rows, several at a time: ragged rows cost
what they hold, and a step works on many small products at once, which is what keeps several cores busy. Trip counts are
data; the pages of a few tiles are gathered, never the pool.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import partial
from pallas_kernels.partial import Partial
from pallas_kernels.softmax import Running, finish, fold_tiles, start, varying_zero
from pallas_kernels.storage import K, V, gather_heads

TILE_TOKENS = 128
STEP_BYTES = 1 << 20
"""K and V of the tiles that one step works on: large enough to share out among cores, small enough for a cache."""
SMALL_STEP_TILES = 2


class Tiles(NamedTuple):
    """The tiles of all rows, one row after the other. `row`: the rows that have entries, in front; `end`: how many
    tiles these and all before them have; `length`: how many it has itself; `total`: of all rows."""

    row: Int[Array, " row"]
    end: Int[Array, " row"]
    length: Int[Array, " row"]
    total: Int[Array, ""]


def tiles_of(row_len: Int[Array, " row"], tile_pages: int) -> Tiles:
    """`row_len` in entries."""
    num_rows = row_len.shape[0]
    live = row_len > 0
    place = jnp.where(live, jnp.cumsum(live) - 1, num_rows)
    row = jnp.zeros(num_rows, jnp.int32).at[place].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
    length = jnp.where(jnp.arange(num_rows) < live.sum(), -(-row_len[row] // tile_pages), 0)
    end = jnp.cumsum(length)
    return Tiles(row, end, length, end[-1])


def _step_tiles(kv_pages: Array, tile_pages: int) -> int:
    page_bytes = math.prod(kv_pages.shape[2:]) * kv_pages.dtype.itemsize
    return max(SMALL_STEP_TILES, STEP_BYTES // page_bytes // tile_pages)


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
    tile_tokens: int = TILE_TOKENS,
    step_tiles: int | None = None,
) -> Partial:
    """See `pallas_kernels.paged_partial`. `tile_tokens`: context of one tile; `step_tiles`: tiles of one step (None:
    as many as STEP_BYTES hold)."""
    num_rows, num_q, num_heads, dim = q.shape
    kvh, page_tokens = kv_pages.shape[3:5]
    group = num_heads // kvh
    tile_pages = max(1, tile_tokens // page_tokens)
    tiles = tiles_of(row_len, tile_pages)
    zero = varying_zero(q, q_pos, kv_pages, jnp.asarray(layer), entries, row_start, row_len)
    qs = q.reshape(num_rows, num_q, kvh, group, dim).transpose(0, 2, 3, 1, 4).reshape(num_rows, kvh, -1, dim)

    def step(running: Running, first: Array, count: int) -> Running:
        """Folds tiles `[first, first + count)` in. They belong to at most `count` rows, neighbours in `tiles.row`."""
        index = first + jnp.arange(count, dtype=jnp.int32)
        place = jnp.minimum(jnp.searchsorted(tiles.end, index, side="right"), num_rows - 1).astype(jnp.int32)
        row = tiles.row[place]
        entry = (index - tiles.end[place] + tiles.length[place])[:, None] * tile_pages + jnp.arange(tile_pages)
        used_entry = (entry < row_len[row][:, None]) & (index < tiles.total)[:, None]
        page, position, num_slots = jnp.moveaxis(
            entries[jnp.clip(row_start[row][:, None] + entry, 0, entries.shape[0] - 1)], 2, 0
        )
        slot = jnp.arange(page_tokens)
        used = ((slot < num_slots[..., None]) & used_entry[..., None]).reshape(count, -1)
        distance = q_pos[row][:, :, None] - (position[..., None] + slot).reshape(count, 1, -1)
        visible = used[:, None] & (distance >= 0) & (q_pos[row] >= 0)[..., None]
        if window is not None:
            visible &= distance < window
        kv = gather_heads(kv_pages, layer, page, dim)
        v = jnp.where(used[:, None, :, None], kv[V], 0)  # 0 * NaN is NaN: unused slots must be 0
        here = place - place[0] == jnp.arange(count)[:, None]  # [row, tile]
        rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, place[0], count), running)
        rows = fold_tiles(
            rows, here, qs[row], kv[K], v, jnp.tile(visible, (1, group, 1)), scale=scale, soft_cap=soft_cap
        )
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, place[0], 0), running, rows)

    large = _step_tiles(kv_pages, tile_pages) if step_tiles is None else step_tiles
    small = min(large, SMALL_STEP_TILES)
    # A step works on `large` neighbouring rows: so many more, that the last ones have neighbours.
    running = start((num_rows + large, kvh, group * num_q), dim, zero)
    num_large = tiles.total // large
    running = lax.fori_loop(0, num_large, lambda i, run: step(run, i * large, large), running)
    done = num_large * large
    num_small = -(-(tiles.total - done) // small)
    running = lax.fori_loop(0, num_small, lambda i, run: step(run, done + i * small, small), running)

    parts = jax.vmap(lambda run: finish(run, num_q))(jax.tree.map(lambda a: a[:num_rows], running))
    live = row_len > 0
    place = jnp.where(live, jnp.cumsum(live) - 1, num_rows - 1)
    none = partial.empty(q.shape)
    return Partial(
        jnp.where(live[:, None, None, None], parts.out[place], none.out),
        jnp.where(live[:, None, None], parts.lse[place], none.lse),
    )
