"""The GPU kernel of `paged_partial`: one warpgroup fetches blocks of pages, another folds them into the online softmax.

A block of the grid is an item (a part of one row's entries) and a KV head. Both warpgroups walk the entries alike, so
that nothing but pages and barriers passes between them. What it is not: items, sizes and the merge (`gpu.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import LN2, LOG2E, ROWS, Ref, acc_columns, empty_acc, load, rows_to_tile, tile
from pallas_kernels.partial import NEG
from pallas_kernels.storage import K, V

PAGE, FIRST, COUNT = range(3)
"""Columns of an entry."""
LAYER, WINDOW = range(2)
"""Places in the scalar arguments."""
ITEM_FIELDS = 4
ROW, START, STOP = range(3)
"""Columns of an item: its row, and the entries `[START, STOP)`; one without entries has nothing to do."""
LOWEST, HIGHEST = range(2)
"""Columns of a row's reach: the smallest and largest position of its queries."""


class Plan(NamedTuple):
    """What is fixed at compile time. A *block* is `block_pages` pages; `stages` blocks are in shared memory at once."""

    kvh: int
    queries: int  # of one row and KV head, a multiple of 8, at most ROWS
    page_tokens: int
    dim: int
    num_pages: int
    scale: float
    soft_cap: float | None
    windowed: bool
    block_pages: int
    stages: int

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_tokens

    @property
    def out_dim(self) -> int:
        """Columns of the partial that pass through shared memory at once."""
        return acc_columns(self.dim)[0].stop


class Refs(NamedTuple):
    """Inputs and outputs in GMEM, then shared memory and its barriers."""

    scalar: Ref  # [2]
    item: Ref  # [item, ITEM_FIELDS]
    reach: Ref  # [row, 2]
    q_pos: Ref  # [row, ROWS]
    table: Ref  # [entry, 3]
    q: Ref  # [row, kvh, queries, dim]
    pool: Ref  # [layers * pages * 2 * kvh, page_tokens, dim]
    out: Ref  # f32 [item, kvh, queries, dim]
    lse: Ref  # f32 [item, kvh, queries]
    q_tile: Ref  # [ROWS, dim]
    k_tile: Ref  # [stages, block_tokens, dim]
    v_tile: Ref  # [stages, block_tokens, dim]
    weight_tile: Ref  # [ROWS, block_tokens]
    out_tile: Ref  # f32 [ROWS, out_dim]
    lse_tile: Ref  # f32 [ROWS]
    q_there: Ref  # barriers: one, the others [stages]
    k_there: Ref
    v_there: Ref
    k_used: Ref
    v_used: Ref


def scratch(plan: Plan) -> tuple:
    """Shared memory and barriers, in the order of `Refs`."""
    kv = tile((plan.stages, plan.block_tokens, plan.dim))
    there = plgpu.Barrier(num_arrivals=plan.block_pages, num_barriers=plan.stages)
    used = plgpu.Barrier(num_barriers=plan.stages)
    return (
        tile((ROWS, plan.dim)),
        *[kv] * 2,
        tile((ROWS, plan.block_tokens)),
        tile((ROWS, plan.out_dim), jnp.float32),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(),
        *[there] * 2,
        *[used] * 2,
    )


def smem_bytes(plan: Plan) -> int:
    """What `scratch` takes; barriers and what the compiler keeps are within the last KiB."""
    kv = 2 * plan.stages * plan.block_tokens * plan.dim
    return 2 * (ROWS * plan.dim + kv + ROWS * plan.block_tokens) + 4 * ROWS * (plan.out_dim + 1) + 1024


class Item(NamedTuple):
    """What a block of the grid works on."""

    index: jax.Array
    head: jax.Array
    row: jax.Array
    start: jax.Array
    stop: jax.Array
    lowest: jax.Array
    highest: jax.Array


class Block(NamedTuple):
    """Pages of a block, as scalars; `count`: 0 for those that no query sees. `source`: what is fetched into each place,
    of those that are not seen another one's page, so that what nobody sees is not fetched."""

    source: list[jax.Array]
    first: list[jax.Array]
    count: list[jax.Array]
    seen: jax.Array  # whether some query sees some of it
    full: jax.Array  # whether every slot holds a token
    whole: jax.Array  # whether every query sees every slot


def _look(refs: Refs, plan: Plan, item: Item, step: jax.Array) -> Block:
    source, first, count = [], [], []
    seen, full, whole = False, True, True
    some_page = jnp.int32(0)
    for place in range(plan.block_pages):
        entry = item.start + step * plan.block_pages + place
        at = jnp.minimum(entry, item.stop - 1)
        page, begin, slots = (refs.table[at, column] for column in (PAGE, FIRST, COUNT))
        visible = (entry < item.stop) & (slots > 0) & (begin <= item.highest)
        all_see = begin + plan.page_tokens - 1 <= item.lowest
        if plan.windowed:
            visible &= begin + slots - 1 > item.lowest - refs.scalar[WINDOW]
            all_see &= begin > item.highest - refs.scalar[WINDOW]
        some_page = jnp.where(visible, page, some_page)
        source.append((visible, page))
        first.append(begin)
        count.append(jnp.where(visible, slots, 0))
        seen |= visible
        full &= count[-1] == plan.page_tokens
        whole &= all_see
    pages = [jnp.where(visible, page, some_page) for visible, page in source]
    return Block(pages, first, count, jnp.bool_(seen), jnp.bool_(full), jnp.bool_(full & whole))


def _num_steps(plan: Plan, item: Item) -> jax.Array:
    return lax.div(item.stop - item.start + (plan.block_pages - 1), jnp.int32(plan.block_pages))


def _place(target: Ref, plan: Plan, stage: jax.Array, place: int):
    """Where a page of a block is fetched to."""
    return target.at[stage, pl.ds(place * plan.page_tokens, plan.page_tokens)]


def _fetch(refs: Refs, plan: Plan, item: Item) -> None:
    """The fetching warpgroup: each block that is seen, as soon as the other is done with its place."""
    layer = refs.scalar[LAYER] * plan.num_pages

    def copy_pages(block: Block, turn: jax.Array) -> None:
        stage = lax.rem(turn, jnp.int32(plan.stages))
        for kv, target, there, used in (
            (K, refs.k_tile, refs.k_there, refs.k_used),
            (V, refs.v_tile, refs.v_there, refs.v_used),
        ):
            pl.when(turn >= plan.stages)(lambda used=used: plgpu.barrier_wait(used.at[stage]))
            for place, page in enumerate(block.source):
                source = refs.pool.at[((layer + page) * 2 + kv) * plan.kvh + item.head]
                plgpu.copy_gmem_to_smem(source, _place(target, plan, stage, place), there.at[stage])

    def one(step, turn):
        block = _look(refs, plan, item, step)
        pl.when(block.seen)(lambda: copy_pages(block, turn))
        return turn + block.seen.astype(jnp.int32)

    lax.fori_loop(0, _num_steps(plan, item), one, jnp.int32(0))


def _pick(place: jax.Array, values: list[jax.Array]) -> jax.Array:
    """`values[place]`, element by element."""
    picked = jnp.full(place.shape, 0, jnp.int32)
    for index, value in enumerate(values):
        picked = jnp.where(place == index, value, picked)
    return picked


def _visible(refs: Refs, plan: Plan, block: Block, q_pos: jax.Array) -> jax.Array:
    """bool [ROWS, block_tokens]"""
    shape = (ROWS, plan.block_tokens)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    place, slot = lax.div(token, jnp.int32(plan.page_tokens)), lax.rem(token, jnp.int32(plan.page_tokens))
    position, mine = _pick(place, block.first) + slot, rows_to_tile(q_pos, shape)
    seen = (slot < _pick(place, block.count)) & (position <= mine)
    return seen & (position > mine - refs.scalar[WINDOW]) if plan.windowed else seen


def _clear_unused(refs: Refs, plan: Plan, block: Block, stage: jax.Array) -> None:
    """0 * NaN is NaN: V of slots that are not used must be 0."""
    shape = (plan.block_tokens, plan.dim)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    place, slot = lax.div(token, jnp.int32(plan.page_tokens)), lax.rem(token, jnp.int32(plan.page_tokens))
    values = plgpu.layout_cast(refs.v_tile.at[stage][...], plgpu.Layout.WGMMA)
    refs.v_tile.at[stage][...] = jnp.where(slot < _pick(place, block.count), values, jnp.zeros_like(values))
    plgpu.commit_smem()


class Running(NamedTuple):
    """The online softmax. `top`: in base 2; `turn`: blocks folded."""

    acc: tuple[jax.Array, ...]  # f32 [ROWS, columns], see `hopper.acc_columns`
    top: jax.Array  # f32 [ROWS]
    total: jax.Array  # f32 [ROWS]
    turn: jax.Array


def _fold(refs: Refs, plan: Plan, block: Block, q_pos: jax.Array, running: Running) -> Running:
    stage = lax.rem(running.turn, jnp.int32(plan.stages))

    def q_times_k(acc):
        plgpu.wgmma(acc, refs.q_tile, refs.k_tile.at[stage].transpose((1, 0)))
        return acc[...]

    plgpu.barrier_wait(refs.k_there.at[stage])
    score = pl.run_scoped(q_times_k, plgpu.WGMMAAccumulatorRef((ROWS, plan.block_tokens), jnp.float32))
    plgpu.barrier_arrive(refs.k_used.at[stage])
    if plan.soft_cap is None:
        score = score * (plan.scale * LOG2E)
    else:
        score = jnp.tanh(score * (plan.scale / plan.soft_cap)) * (plan.soft_cap * LOG2E)
    masked = lambda score: jnp.where(_visible(refs, plan, block, q_pos), score, NEG)
    score = lax.cond(block.whole, lambda score: score, masked, score)
    top = jnp.maximum(running.top, score.max(axis=1))
    # A query that has seen nothing yet has top == NEG and would weigh hidden keys exp(0): its shift is 0 instead.
    weight = jnp.exp2(score - rows_to_tile(jnp.where(top == NEG, 0.0, top), score.shape))
    decay = jnp.exp2(running.top - top)
    total = running.total * decay + weight.sum(axis=1)
    refs.weight_tile[...] = weight.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.v_there.at[stage])
    pl.when(~block.full)(lambda: _clear_unused(refs, plan, block, stage))
    acc = []
    for part, columns in zip(running.acc, acc_columns(plan.dim), strict=True):

        def weight_times_v(ref, columns=columns):
            plgpu.wgmma(ref, refs.weight_tile, refs.v_tile.at[stage, :, columns])
            return ref[...]

        added = pl.run_scoped(weight_times_v, plgpu.WGMMAAccumulatorRef((ROWS, part.shape[1]), jnp.float32))
        acc.append(part * rows_to_tile(decay, part.shape) + added)
    plgpu.barrier_arrive(refs.v_used.at[stage])
    return Running(tuple(acc), top, total, running.turn + 1)


def _compute(refs: Refs, plan: Plan, item: Item) -> None:
    """The computing warpgroup."""
    of_rows = plgpu.Layout.WGMMA.reduce(1)
    some_rows = pl.ds(0, plan.queries)  # the others hold anything, and nobody reads what becomes of them
    plgpu.copy_gmem_to_smem(refs.q.at[item.row, item.head], refs.q_tile.at[some_rows], refs.q_there)
    q_pos = load(refs.q_pos.at[item.row], layout=of_rows)
    plgpu.barrier_wait(refs.q_there)

    def one(step, running):
        block = _look(refs, plan, item, step)
        fold = lambda running: _fold(refs, plan, block, q_pos, running)
        return lax.cond(block.seen, fold, lambda running: running, running)

    column = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), of_rows)
    running = Running(empty_acc(plan.dim), column(NEG), column(0.0), jnp.int32(0))
    running = lax.fori_loop(0, _num_steps(plan, item), one, running)

    total = jnp.where(running.total > 0, running.total, 1.0)
    refs.lse_tile[...] = jnp.where(running.total > 0, running.top * LN2 + jnp.log(total), NEG)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.lse_tile.at[some_rows], refs.lse.at[item.index, item.head])
    for part, columns in zip(running.acc, acc_columns(plan.dim), strict=True):
        plgpu.wait_smem_to_gmem(0)
        refs.out_tile[...] = part * rows_to_tile(1.0 / total, part.shape)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.out_tile.at[some_rows], refs.out.at[item.index, item.head, :, columns])
    plgpu.wait_smem_to_gmem(0)


def kernel(*refs_in_order: Ref, plan: Plan) -> None:
    """One item and KV head."""
    refs = Refs(*refs_in_order)
    index, head = lax.axis_index("item"), lax.axis_index("head")
    row, start, stop = (refs.item[index, column] for column in (ROW, START, STOP))
    item = Item(index, head, row, start, stop, *(refs.reach[row, column] for column in (LOWEST, HIGHEST)))
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(lambda: _compute(refs, plan, item))
    pl.when(warpgroup == 1)(lambda: _fetch(refs, plan, item))
