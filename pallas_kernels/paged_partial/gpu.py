"""`paged_partial` as a Pallas Mosaic GPU kernel for Hopper.

The rows' entries are cut into *items* of about equal length, as data, so that one row of a million tokens keeps all
multiprocessors busy and 128 short ones do too; each item gives a partial, and those of a row are merged in JAX. A page
is fetched when a query of its row sees some of it. Entries before and behind a window are left out at once.

Here: the arrays the kernel wants, sizes, and the merge; the kernel is in `gpu_kernel.py`. It has run in JAX's
interpreter and been compiled for H200, no more. What it is not: a writer of pages (`storage.py` writes in place).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.hopper import (
    NO_WINDOW,
    ROWS,
    SMEM_LIMIT_BYTES,
    SWIZZLE_DIM,
    require_bfloat16,
    require_dim,
    require_hopper,
    require_jax,
)
from pallas_kernels.paged_partial.gpu_kernel import COUNT, FIRST, Plan, kernel, scratch, smem_bytes
from pallas_kernels.partial import NEG, Partial
from pallas_kernels.storage import decode_bits

BLOCK_TOKENS = 64
MAX_STAGES = 4
BLOCKS_OF_GRID = 2 * 132
"""Blocks of the grid that the context is shared out to: two for each multiprocessor of an H100 or H200."""
ITEM_BLOCKS = 8
"""Blocks of pages of an item, at least: less is not worth a partial of its own."""
PAGE_TOKENS = (8, 16, 32, 64, 128)
SUBLANES = 8
"""Rows that a tile of shared memory has."""


class Items(NamedTuple):
    """`item`: [item, 4] int32, columns as in `gpu_kernel`; `row`: its row, `num_rows` for those without work."""

    item: Int[Array, "item 4"]
    row: Int[Array, " item"]


def share_out(start: Int[Array, " row"], length: Int[Array, " row"], block_pages: int, num_shares: int) -> Items:
    """Cuts the rows' entries into `num_shares + rows` items at most, none larger than needed, each a row's alone."""
    num_rows = start.shape[0]
    blocks = -(-length // block_pages)
    size = jnp.maximum(-(-blocks.sum() // num_shares), ITEM_BLOCKS)
    parts = -(-blocks // size)
    end = jnp.cumsum(parts)
    index = jnp.arange(num_shares + num_rows, dtype=jnp.int32)
    row = jnp.searchsorted(end, index, side="right").astype(jnp.int32)
    at = jnp.minimum(row, num_rows - 1)
    first = (index - (end - parts)[at]) * size * block_pages
    stop = jnp.minimum(first + size * block_pages, length[at])
    first, stop = start[at] + first, start[at] + jnp.where(row < num_rows, stop, first)
    return Items(jnp.stack([at, first, jnp.maximum(first, stop), jnp.zeros_like(at)], axis=1), row)


def bracket(
    entries: Int[Array, "entry 3"],
    start: Int[Array, " row"],
    length: Int[Array, " row"],
    reach: Int[Array, "row 2"],
    window: int | Array,
) -> tuple[Int[Array, " row"], Int[Array, " row"]]:
    """Start and length of the smallest range that holds every entry that a query of the row sees."""
    index = jnp.arange(entries.shape[0], dtype=jnp.int32)
    first, last = entries[:, FIRST], entries[:, FIRST] + entries[:, COUNT] - 1
    mine = (index >= start[:, None]) & (index < (start + length)[:, None]) & (entries[:, COUNT] > 0)
    seen = mine & (first <= reach[:, 1:]) & (last > reach[:, :1] - window)
    low = jnp.where(seen, index, entries.shape[0]).min(axis=1)
    high = jnp.where(seen, index + 1, 0).max(axis=1)
    return jnp.minimum(low, high), jnp.maximum(high - low, 0)


def merge_items(parts: Partial, row: Int[Array, " item"], num_rows: int) -> Partial:
    """Merges the partials `[item, kvh, query, ...]` of each row; rows without items are empty."""
    shape = (num_rows, *parts.lse.shape[1:])
    top = jnp.full(shape, NEG).at[row].max(parts.lse, mode="drop")
    weight = jnp.exp(parts.lse - top.at[row].get(mode="fill", fill_value=0.0))
    total = jnp.zeros(shape).at[row].add(weight, mode="drop")
    out = jnp.zeros((*shape, parts.out.shape[-1])).at[row].add(weight[..., None] * parts.out, mode="drop")
    total = jnp.where(total > 0, total, 1.0)
    return Partial(out / total[..., None], top + jnp.log(total))


def choose_plan(plan: Plan, block_pages: int | None, stages: int | None) -> Plan:
    """`plan` with as many pages as make a block and as many stages as fit, or those that are given."""
    pages = block_pages or max(1, BLOCK_TOKENS // plan.page_tokens)
    if pages * plan.page_tokens not in (64, 128, 256):
        raise ValueError(
            f"block_pages: pages of {plan.page_tokens} tokens must make 64, 128 or 256, not {pages} of them"
        )
    if stages is not None and stages < 2:
        raise ValueError(f"stages: must be 2 or more, not {stages}")
    for n in (stages,) if stages else range(MAX_STAGES, 1, -1):
        chosen = plan._replace(block_pages=pages, stages=n)
        if smem_bytes(chosen) <= SMEM_LIMIT_BYTES:
            return chosen
    raise NotImplementedError(f"shared memory: {chosen} takes more than there is")


def _refuse(q: Array, kv_pages: Array, interpreted: bool) -> None:
    require_jax()
    if not interpreted:
        require_hopper()
    require_bfloat16(q=q, kv_pages=kv_pages)
    page_tokens, pool_dim = kv_pages.shape[4:]
    require_dim("pool_dim", pool_dim, SWIZZLE_DIM)
    if page_tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"page_tokens: one of {PAGE_TOKENS}, not {page_tokens}")
    if q.shape[2] // kv_pages.shape[3] > ROWS:
        raise NotImplementedError(f"q: {ROWS} query heads of a KV head at most, not {q.shape[2] // kv_pages.shape[3]}")
    if q.size == 0:
        raise NotImplementedError(f"q: empty, {q.shape}")


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
    block_pages: int | None = None,
    stages: int | None = None,
    shares: int | None = None,
    interpret: Any = False,
) -> Partial:
    """See `pallas_kernels.paged_partial`.

    block_pages, stages: sizes (see `Plan`), and shares: into how many items the context of all rows is cut, at least,
    instead of the heuristic's. interpret: run it in JAX, on CPU, by these InterpretGPUParams.
    Errors: NotImplementedError for dtypes, page sizes,
    dims and versions of jax it does not serve, ValueError for other sizes.
    """
    kv_pages = decode_bits(kv_pages)
    _refuse(q, kv_pages, interpreted=bool(interpret))
    num_rows, qtok, heads, dim = q.shape
    layers, num_pages, _, kvh, page_tokens, pool_dim = kv_pages.shape
    group = heads // kvh
    # A row of more queries than a tile has rows is several rows with the same entries.
    part = max(n for n in range(1, qtok + 1) if qtok % n == 0 and n * group <= ROWS)
    rows, queries = num_rows * qtok // part, -(-part * group // SUBLANES) * SUBLANES
    plan = Plan(
        kvh=kvh, queries=queries, page_tokens=page_tokens, dim=pool_dim, num_pages=num_pages, scale=scale,
        soft_cap=soft_cap, windowed=window is not None, block_pages=1, stages=2,
    )  # fmt: skip
    plan = choose_plan(plan, block_pages, stages)

    position = q_pos.reshape(rows, part)
    reach = jnp.stack([jnp.where(position < 0, NO_WINDOW, position).min(axis=1), position.max(axis=1)], axis=1)
    start, length = (jnp.repeat(a, qtok // part) for a in (row_start, row_len))
    length = jnp.where(reach[:, 1] < 0, 0, length)
    if window is not None:
        start, length = bracket(entries, start, length, reach, window)
    items = share_out(start, length, plan.block_pages, shares or max(1, BLOCKS_OF_GRID // kvh))

    fill = ((0, 0), (0, 0), (0, queries - part * group), (0, pool_dim - dim))
    tiles = q.reshape(rows, part, kvh, group, dim).transpose(0, 2, 1, 3, 4).reshape(rows, kvh, part * group, dim)
    # as integers, so that no padding makes XLA compare floats; -1 sees nothing
    q_rows = jnp.pad(jnp.repeat(position, group, axis=1), ((0, 0), (0, ROWS - part * group)), constant_values=-1)
    scalars = jnp.stack([jnp.int32(layer), jnp.int32(NO_WINDOW if window is None else window)])
    pool = kv_pages.reshape(layers * num_pages * 2 * kvh, page_tokens, pool_dim)
    parts = _call(plan, scalars, items, reach, q_rows, entries, jnp.pad(tiles, fill), pool, interpret)

    merged = merge_items(parts, items.row, rows)
    tokens = lambda a: a[:, :, : part * group].reshape(rows, kvh, part, group, *a.shape[3:]).swapaxes(1, 2)
    out = tokens(merged.out[..., :dim]).reshape(num_rows, qtok, heads, dim)
    lse = tokens(merged.lse).reshape(num_rows, qtok, heads)
    there = (q_pos >= 0)[..., None]
    return Partial(jnp.where(there[..., None], out, 0.0), jnp.where(there, lse, NEG))


def _call(
    plan: Plan,
    scalars: Int[Array, "2"],
    items: Items,
    reach: Int[Array, "row 2"],
    q_rows: Int[Array, "row 64"],
    entries: Int[Array, "entry 3"],
    tiles: Float[Array, "row kvh query pool_dim"],
    pool: Float[Array, "page page_tokens pool_dim"],
    interpret: Any,
) -> Partial:
    shape = (items.item.shape[0], plan.kvh, plan.queries)
    run = plgpu.kernel(
        partial(kernel, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct((*shape, plan.dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=scratch(plan),
        grid=(shape[0], plan.kvh),
        grid_names=("item", "head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
        kernel_name="paged_partial",
    )
    return Partial(*run(scalars, items.item, reach, q_rows, entries, tiles, pool))
