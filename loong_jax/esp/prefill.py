"""Prefill of one chunk over a group: striped ring attention, context in two forms, retention while KV circulates.

The batch's new tokens are cut into units of at most one page and striped over the ranks, unit u on rank u mod dop. Per
layer a rank's queries meet (1) the chunk's own KV, which rotates around the ring, (2) resident context, either in fixed
tiles that rotate too, or (3) in place, with the queries gathered instead. Each block in hand carries its *homes*: the
rank and page where each page of it is to be kept. So after the last step the KV lies where the next group wants it, and
scaling down adds no collective (LoongServe 4.1, proactive migration). Context pages may be re-homed the same way.

Trip counts, placement and context are data; one program serves them all. What it is not: who decides placement
(`policy/`), packing of the data (`staging.py`), the mask law (`pallas_kernels/flash_partial`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from loong_jax.config import ModelConfig
from loong_jax.esp.layout import (
    NOWHERE,
    UNIT_COUNT,
    UNIT_FIRST,
    UNIT_HOME,
    UNIT_ROW,
    StepShape,
    adjust_layout,
    prefill_layout,
)
from loong_jax.esp.sampled import sampled_rows, scored_tokens
from loong_jax.kv_pool import InstanceState, apply_deltas
from loong_jax.model.decoder import Attend, decode_stack, layer_window, logits
from pallas_kernels.flash_partial import flash_partial
from pallas_kernels.paged_partial import paged_partial
from pallas_kernels.partial import Partial, empty, merge, merge_many
from pallas_kernels.storage import gather_pages, write_pages


class Block(NamedTuple):
    """KV in hand with what is needed to mask and keep it. It travels the ring as a whole.

    K and V are two arrays: kernels take them so, and to cut one in two is a copy at each step of the ring."""

    k: Float[Array, "tok kvh dim"]
    v: Float[Array, "tok kvh dim"]
    units: Int[Array, "unit 4"]  # row, first position, count, home (see esp/layout.py)


class Masked(NamedTuple):
    """Request row and position of each token; row < 0 is padding."""

    row: Int[Array, " tok"]
    position: Int[Array, " tok"]


def token_mask(units: Int[Array, "unit 4"], page_tokens: int) -> Masked:
    """Row and position of every token of units, slot by slot."""
    slot = jnp.arange(page_tokens, dtype=jnp.int32)[None]
    used = slot < units[:, UNIT_COUNT, None]
    row = jnp.where(used, units[:, UNIT_ROW, None], NOWHERE)
    position = jnp.where(used, units[:, UNIT_FIRST, None] + slot, 0)
    return Masked(row.reshape(-1), position.reshape(-1))


def keep_pages(kv_pages: jax.Array, layer: jax.Array | int, block: Block, shape: StepShape) -> jax.Array:
    """Write the pages of the block in hand whose home is this rank."""
    home = block.units[:, UNIT_HOME]
    mine = (home >= 0) & (home // shape.num_pages == lax.axis_index("sp"))
    page = jnp.where(mine, home % shape.num_pages, shape.num_pages)
    return write_pages(kv_pages, layer, page, block.k, block.v)


def travel(block: Block, dop: int) -> Block:
    """Hand the block to the next rank of the ring."""
    ring = [(i, (i + 1) % dop) for i in range(dop)]
    return jax.tree.map(lambda x: lax.ppermute(x, "sp", ring), block)


def ring(
    use: Callable[[Partial, jax.Array, Block], tuple[Partial, jax.Array]],
    partial: Partial,
    kv_pages: jax.Array,
    block: Block,
    dop: int,
) -> tuple[Partial, jax.Array]:
    """Every rank uses every rank's block once, its own first. The last step is peeled: no transfer follows it."""

    def body(_, carry):
        partial, kv_pages, block = carry
        following = travel(block, dop)  # independent of the use of `block`, so it overlaps
        partial, kv_pages = use(partial, kv_pages, block)
        # XLA unrolls a loop of one step (DoP 2), and would wait for the transfer before it uses either block.
        partial, following = lax.optimization_barrier((partial, following))
        return partial, kv_pages, following

    if dop > 1:
        # a loop, not unrolled steps: XLA would hoist unrolled transfers and keep every copy alive
        partial, kv_pages, block = lax.fori_loop(0, dop - 1, body, (partial, kv_pages, block))
    return use(partial, kv_pages, block)


class Context(NamedTuple):
    """Resident context of the batch: this instance's page table and the entries of each batch row."""

    table: Int[Array, "entries 3"]
    moves: Int[Array, " entries"]  # home a context page moves to, or NOWHERE
    start: Int[Array, " row"]
    length: Int[Array, " row"]

    def tile(self, index: jax.Array, shape: StepShape) -> tuple[Int[Array, " pages"], Int[Array, "pages 4"]]:
        """Pages and units of tile `index` of this rank's context: the rows' entries, one row after the other."""
        ends = jnp.cumsum(self.length)
        ordinal = index * shape.ring_pages + jnp.arange(shape.ring_pages, dtype=jnp.int32)
        row = jnp.minimum(jnp.searchsorted(ends, ordinal, side="right"), ends.shape[0] - 1).astype(jnp.int32)
        entry = self.start[row] + ordinal - (ends[row] - self.length[row])
        used = ordinal < ends[-1]
        entry = jnp.where(used, entry, 0)
        page, first, count = self.table[entry, 0], self.table[entry, 1], self.table[entry, 2]
        units = jnp.stack(
            [
                jnp.where(used, row, NOWHERE),
                first,
                jnp.where(used, count, 0),
                jnp.where(used, self.moves[entry], NOWHERE),
            ],
            axis=1,
        )
        return jnp.where(used, page, 0), units


def _attend_gathered(
    partial: Partial,
    q: Float[Array, "tok head dim"],
    units: Int[Array, "unit 4"],
    kv_pages: jax.Array,
    layer: jax.Array | int,
    context: Context,
    num_tiles: jax.Array,
    model: ModelConfig,
    shape: StepShape,
) -> Partial:
    """Context stays put: tiles of every rank's queries are gathered, partials come back to their owner."""
    dop, tile_units, page_tokens = shape.dop, shape.query_tile_units, shape.page_tokens
    tile_tokens = tile_units * page_tokens
    heads, dim = q.shape[1:]

    def body(index, partial):
        q_tile = lax.dynamic_slice_in_dim(q, index * tile_tokens, tile_tokens)
        unit_tile = lax.dynamic_slice_in_dim(units, index * tile_units, tile_units)
        if dop > 1:
            q_tile = lax.all_gather(q_tile, "sp", tiled=True)
            unit_tile = lax.all_gather(unit_tile, "sp", tiled=True)
        mask = token_mask(unit_tile, page_tokens)
        q_pos = jnp.where(mask.row >= 0, mask.position, NOWHERE).reshape(-1, page_tokens)
        row = jnp.maximum(unit_tile[:, UNIT_ROW], 0)
        length = jnp.where(unit_tile[:, UNIT_ROW] >= 0, context.length[row], 0)
        q_rows = q_tile.reshape(-1, page_tokens, heads, dim)
        part = paged_partial(
            q_rows, q_pos, kv_pages, layer, context.table, context.start[row], length,
            scale=model.attention_scale, window=layer_window(model, layer), soft_cap=model.attn_soft_cap,
            platform=shape.platform, implementation=shape.attention, tuning=shape.tuning,
        )  # fmt: skip
        part = Partial(part.out.reshape(-1, heads, dim), part.lse.reshape(-1, heads))
        if dop > 1:
            part = merge_many(exchange(part, dop))
        at = index * tile_tokens
        mine = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, tile_tokens), partial)
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, at, 0), partial, merge(mine, part))

    return lax.fori_loop(0, num_tiles, body, partial)


def exchange(partial: Partial, dop: int) -> Partial:
    """All-to-all of partials `[dop * tok, ...]` in rank order to their owners: `[dop, tok, ...]`, one collective."""
    tok, heads, dim = partial.out.shape[0] // dop, *partial.out.shape[1:]
    packed = jnp.concatenate([partial.out.reshape(dop, -1), partial.lse.reshape(dop, -1)], axis=1)
    packed = lax.all_to_all(packed, "sp", 0, 0)
    split = tok * heads * dim
    return Partial(packed[:, :split].reshape(dop, tok, heads, dim), packed[:, split:].reshape(dop, tok, heads))


def prefill_attention(fields: dict[str, jax.Array], context: Context, model: ModelConfig, shape: StepShape) -> Attend:
    """The model's attention argument for a prefill step; the carry is the pool."""
    units = fields["units"]
    mask = token_mask(units, shape.page_tokens)

    def attend(kv_pages, layer, q, k, v):
        window = layer_window(model, layer)

        def use(partial, kv_pages, block):
            kv_mask = token_mask(block.units, shape.page_tokens)
            part = flash_partial(
                q, block.k, block.v, mask.row, mask.position, kv_mask.row, kv_mask.position,
                scale=model.attention_scale, window=window, soft_cap=model.attn_soft_cap,
                platform=shape.platform, implementation=shape.attention, tuning=shape.tuning,
            )  # fmt: skip
            return merge(partial, part), keep_pages(kv_pages, layer, block, shape)

        def use_tile(index, carry):
            partial, kv_pages = carry
            page, tile_units = context.tile(index, shape)
            tile = gather_pages(kv_pages, layer, page, model.head_dim, k.dtype)
            return ring(use, partial, kv_pages, Block(*tile, tile_units), shape.dop)

        partial = empty(q.shape)
        partial, kv_pages = ring(use, partial, kv_pages, Block(k, v, units), shape.dop)
        partial, kv_pages = lax.fori_loop(0, fields["num_ring_tiles"], use_tile, (partial, kv_pages))
        partial = _attend_gathered(partial, q, units, kv_pages, layer, context, fields["num_query_tiles"], model, shape)
        return partial.out.astype(q.dtype), kv_pages

    return attend


def _sample_rows(
    params, hidden: jax.Array, fields: dict[str, jax.Array], adjust: jax.Array, model: ModelConfig, shape: StepShape
) -> Int[Array, "row size"]:
    """What each emitting row gives (`sampled.py`), the same on every rank; zeros for the others.

    A row's last token lies on one rank; the sum over ranks hands its sample to all of them."""

    def some(_):
        mine = fields["emit_index"] >= 0
        rows = hidden[jnp.maximum(fields["emit_index"], 0)]
        adjustment = adjust_layout(shape, shape.prefill_rows).unpack(adjust)
        raw = logits(params, model, rows, tp_axis="tp")
        sampled = sampled_rows(raw, fields, adjustment, fields["emit_position"], shape)
        return jnp.where(mine[:, None], sampled, 0)

    def none(_):
        return jnp.zeros((shape.prefill_rows, shape.sampled_size), jnp.int32)

    return lax.psum(lax.cond(fields["num_emits"] > 0, some, none, None), "sp")


def prefill_step(
    params,
    state: InstanceState[jax.Array],
    packed: jax.Array,
    adjust: jax.Array,
    moves: jax.Array,
    *,
    model: ModelConfig,
    shape: StepShape,
):
    """One chunk. Local arguments of one device: `packed`, `adjust`, `moves` int32 `[size]`, params and state without
    their leading axes. Returns the state, `[prefill_rows, sampled_size]`, and of a scoring step also the scores of all
    tokens of the chunk, `[dop * bucket, 1 + 2 * num_top]` in rank order; the same on every rank."""
    fields = prefill_layout(shape).unpack(packed)
    table = apply_deltas(state.table, fields["deltas"])
    context = Context(table, moves, fields["context_start"], fields["context_len"])
    row, position = token_mask(fields["units"], shape.page_tokens)
    rope_len = fields["rope_len"][jnp.maximum(row, 0)] if model.rope_by_length else None
    attend = prefill_attention(fields, context, model, shape)
    hidden, kv = decode_stack(
        params, model, fields["tokens"], position, attend, state.kv, rope_len=rope_len, tp_axis="tp"
    )
    sampled = _sample_rows(params, hidden, fields, adjust, model, shape)
    tokens = state.tokens.at[fields["emit_slot"]].set(sampled[:, 0], mode="drop")
    state = InstanceState(kv, table, tokens)
    if not shape.scores:
        return state, sampled
    scores = scored_tokens(lambda rows: logits(params, model, rows, tp_axis="tp"), hidden, fields, shape)
    return state, sampled, lax.all_gather(scores, "sp", tiled=True)
