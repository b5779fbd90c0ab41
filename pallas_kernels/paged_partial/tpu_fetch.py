"""The half of the TPU kernel of `paged_partial` that finds pages and starts their fetch: a scalar program.

It walks the rows' table entries tile by tile, keeps those that some query sees, and starts the fetch of up to
`block_pages` pages into one half of a double buffer, without regard to where one row ends and the next begins. What it
is not: the half that waits for them and computes (`tpu_kernel.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8
"""Rows of a tile of memory."""
CHUNK = 128
"""Entries of one chunk of the table."""
PAGE, FIRST, COUNT = range(3)
"""Columns of an entry."""
LAYER, WINDOW, FIRST_ROW = range(3)
"""Places in the scalar arguments."""
ROW, CURSOR, STOP, TILE, NEXT_ROW, NEXT_CHUNK, TURN, MASKED_ROW = range(8)
"""Places in the producer's state: the row and the entries `[CURSOR, STOP)` of table tile `TILE` that are left to look
at; the row and first chunk of the tile that is in flight; the half of the buffer whose block is next, and the row that
`q_pos` is set for (both the consumer's)."""
STATE_SIZE = 8


class Plan(NamedTuple):
    """What is fixed at compile time. A *unit* is `unit_rows` neighbouring rows folded together: those that share
    their entries fetch them once. A step of the grid does `step_units` units. A *tile* of the table is `tile_chunks`
    chunks. A *block* is what one half of the buffer holds; it is folded `fold_pages` at a time."""

    num_rows: int  # a multiple of unit_rows
    qtok: int
    group: int  # query heads of a KV head
    kvh: int
    page_tokens: int
    pool_dim: int
    num_chunks: int
    tile_chunks: int
    scale: float
    soft_cap: float | None
    unit_rows: int = 1
    step_units: int = 1
    block_pages: int = 1  # a multiple of fold_pages
    fold_pages: int = 1

    @property
    def queries(self) -> int:
        """Rows of the matrix of queries of one unit and one KV head."""
        return self.unit_rows * self.qtok * self.group

    @property
    def flat(self) -> bool:
        """Whether a page is seen as rows of `pool_dim`, not as heads of tokens: where a tile of memory holds more
        than one head's tokens, heads can not be sliced out of it. What lies where is the same."""
        return self.page_tokens < SUBLANES

    @property
    def page_shape(self) -> tuple[int, ...]:
        if self.flat:
            return (2 * self.kvh * self.page_tokens, self.pool_dim)
        return (2, self.kvh, self.page_tokens, self.pool_dim)


class Refs(NamedTuple):
    """`start` ... `end`: see `tpu.Runs`, in SMEM, as are `scalar` (LAYER, WINDOW, FIRST_ROW) and `q_position`.
    `page_position`, `page_count`: of each page of each half of the buffer; `block_row`, `block_size` (in pages),
    `block_tokens`: of each half."""

    scalar: jax.Ref  # [3]
    start: jax.Ref  # [row]
    length: jax.Ref  # [row]
    lowest: jax.Ref  # [row]
    highest: jax.Ref  # [row]
    following: jax.Ref  # [row]
    end: jax.Ref  # [row]
    q_position: jax.Ref  # [row * qtok]
    q: jax.Ref  # [step_units, kvh, queries, pool_dim]
    table: jax.Ref  # [num_chunks, 3, CHUNK] in HBM
    pool: jax.Ref  # [layers, pages, *page_shape] in HBM
    out: jax.Ref  # [step_units, kvh, queries, pool_dim]
    lse: jax.Ref  # [step_units, kvh, 1, queries]
    buffer: jax.Ref  # [2, block_pages, *page_shape]
    tile: jax.Ref  # [2, tile_chunks, 3, CHUNK] in SMEM
    tile_vector: jax.Ref  # [2, tile_chunks, 3, CHUNK] in VMEM
    state: jax.Ref  # [STATE_SIZE]
    page_position: jax.Ref  # [2 * block_pages]
    page_count: jax.Ref  # [2 * block_pages]
    block_row: jax.Ref  # [2]
    block_size: jax.Ref  # [2]
    block_tokens: jax.Ref  # [2]
    q_column: jax.Ref  # [queries, 1] in VMEM
    top: jax.Ref  # [kvh, queries, LANES]
    total: jax.Ref  # [kvh, queries, LANES]
    acc: jax.Ref  # [kvh, queries, pool_dim]
    fetched: jax.Ref  # DMA semaphore of each half of the buffer
    tile_fetched: jax.Ref  # DMA semaphore of each tile slot


def _tile_copies(refs: Refs, plan: Plan, chunk: jax.Array, tile: jax.Array):
    """The tile from `chunk` on, once to be read by the scalar core and once as vectors."""
    source = refs.table.at[pl.ds(jnp.minimum(chunk, plan.num_chunks - plan.tile_chunks), plan.tile_chunks)]
    for target in (refs.tile, refs.tile_vector):
        yield pltpu.make_async_copy(source, target.at[tile], refs.tile_fetched.at[tile])


def _start_tile(refs: Refs, plan: Plan, row: jax.Array, chunk: jax.Array, tile: jax.Array) -> None:
    refs.state[NEXT_ROW] = row
    refs.state[NEXT_CHUNK] = chunk

    @pl.when(row < plan.num_rows)
    def _():
        for copy in _tile_copies(refs, plan, chunk, tile):
            copy.start()


def _first_chunk(refs: Refs, plan: Plan, row: jax.Array) -> jax.Array:
    return refs.start[jnp.minimum(row, plan.num_rows - 1)] // CHUNK


def _is_visible(refs: Refs, row: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """Whether some query of the run sees a position of the page."""
    past = refs.lowest[row] - refs.scalar[WINDOW]
    return (first <= refs.highest[row]) & (count > 0) & (first + count - 1 > past)


def _enter_tile(refs: Refs, plan: Plan) -> None:
    """The tile in flight becomes the one at hand, and the next one sets out. The entries of it that are seen are
    bracketed by vectors, so that a window costs the scalar core only what lies in it."""
    row, chunk, tile = refs.state[NEXT_ROW], refs.state[NEXT_CHUNK], 1 - refs.state[TILE]
    for copy in _tile_copies(refs, plan, chunk, tile):
        copy.wait()
    refs.state[ROW] = row
    refs.state[TILE] = tile
    start = refs.start[row]
    stop = start + refs.length[row]
    next_chunk = chunk + plan.tile_chunks
    more = next_chunk * CHUNK < stop
    next_row = jnp.where(more, row, refs.following[row])
    _start_tile(refs, plan, next_row, jnp.where(more, next_chunk, _first_chunk(refs, plan, next_row)), 1 - tile)

    origin = jnp.minimum(chunk, plan.num_chunks - plan.tile_chunks) * CHUNK
    shape = (plan.tile_chunks, CHUNK)
    place = lax.broadcasted_iota(jnp.int32, shape, 0) * CHUNK + lax.broadcasted_iota(jnp.int32, shape, 1)
    first, count = refs.tile_vector[tile, :, FIRST], refs.tile_vector[tile, :, COUNT]
    seen = (place >= jnp.maximum(start, chunk * CHUNK) - origin) & (place < stop - origin)
    seen &= _is_visible(refs, row, first, count)
    refs.state[CURSOR] = jnp.min(jnp.where(seen, place, plan.tile_chunks * CHUNK))
    refs.state[STOP] = jnp.max(jnp.where(seen, place + 1, 0))


def page_copy(refs: Refs, page: jax.Array | int, half: jax.Array, place: jax.Array):
    source = refs.pool.at[refs.scalar[LAYER], page]
    return pltpu.make_async_copy(source, refs.buffer.at[half, place], refs.fetched.at[half])


class Found(NamedTuple):
    """Pages of a block so far, and the slots used in them."""

    pages: jax.Array
    tokens: jax.Array


def _scan(refs: Refs, plan: Plan, half: jax.Array, found: Found) -> Found:
    """Starts the fetch of pages from the tile at hand until the block is full or the tile is done."""
    row, tile, stop = refs.state[ROW], refs.state[TILE], refs.state[STOP]

    def look(carry):
        cursor, found = carry
        page, first, count = (refs.tile[tile, cursor // CHUNK, c, cursor % CHUNK] for c in (PAGE, FIRST, COUNT))
        visible = _is_visible(refs, row, first, count)

        @pl.when(visible)
        def _():
            page_copy(refs, page, half, found.pages).start()
            refs.page_position[half * plan.block_pages + found.pages] = first
            refs.page_count[half * plan.block_pages + found.pages] = count

        found = Found(found.pages + visible.astype(jnp.int32), found.tokens + jnp.where(visible, count, 0))
        return cursor + 1, found

    more = lambda carry: (carry[0] < stop) & (carry[1].pages < plan.block_pages)
    refs.state[CURSOR], found = lax.while_loop(more, look, (refs.state[CURSOR], found))
    return found


def produce(refs: Refs, plan: Plan, half: jax.Array) -> None:
    """Starts the next block of pages into `half`. A block holds pages of one run only; after the last one it is empty
    and of row `num_rows`."""

    def step(carry):
        found = _scan(refs, plan, half, carry[0])
        row_ends = refs.state[NEXT_ROW] != refs.state[ROW]
        closed = (found.pages == plan.block_pages) | (row_ends & (found.pages > 0))
        going = ~closed & (refs.state[NEXT_ROW] < plan.num_rows)

        @pl.when(going)
        def _():
            _enter_tile(refs, plan)

        return found, going

    nothing = Found(jnp.int32(0), jnp.int32(0))
    found, _ = lax.while_loop(lambda carry: carry[1], step, (nothing, jnp.bool_(True)))
    refs.block_row[half] = jnp.where(found.pages > 0, refs.state[ROW], plan.num_rows)
    refs.block_size[half] = found.pages
    refs.block_tokens[half] = found.tokens

    def absent(place, _):
        refs.page_count[half * plan.block_pages + place] = 0

    lax.fori_loop(found.pages, pl.cdiv(found.pages, plan.fold_pages) * plan.fold_pages, absent, None)


def start(refs: Refs, plan: Plan) -> None:
    """Once, before anything else: the first tile and the first block set out."""
    for place, value in ((ROW, -1), (CURSOR, 0), (STOP, 0), (TILE, 1), (TURN, 0), (MASKED_ROW, -1)):
        refs.state[place] = value
    row = refs.scalar[FIRST_ROW]
    _start_tile(refs, plan, row, _first_chunk(refs, plan, row), jnp.int32(0))
    produce(refs, plan, jnp.int32(0))
