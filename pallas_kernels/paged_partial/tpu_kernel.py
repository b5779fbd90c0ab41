"""The TPU kernel of `paged_partial`: waits for a block of pages and folds it into the online softmax of its unit.

While a block is computed the next one, of whichever row, is in flight: `tpu_fetch.produce` starts it first. What it is
not: shapes, budgets and the arrays it is called with (`tpu.py`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.chips import LANES
from pallas_kernels.paged_partial.tpu_fetch import MASKED_ROW, TURN, WINDOW, Plan, Refs, page_copy, produce, start
from pallas_kernels.partial import NEG
from pallas_kernels.storage import K, V

MAX_UNROLLED_HEADS = 8
MAX_UNROLLED_QUERIES = 256


def _wait(refs: Refs, half: jax.Array) -> None:
    def one(place, _):
        page_copy(refs, 0, half, place).wait()

    lax.fori_loop(0, refs.block_size[half], one, None)


def _set_q_column(refs: Refs, plan: Plan, row: jax.Array) -> None:
    """Positions of the unit's queries, -1 for those of other runs."""

    @pl.when(refs.state[MASKED_ROW] != row)
    def _():
        refs.state[MASKED_ROW] = row
        origin = row // plan.unit_rows * plan.unit_rows * plan.qtok
        token = lax.broadcasted_iota(jnp.int32, (plan.queries, 1), 0) // plan.group

        def one(index, column):
            return jnp.where(token == index - origin, refs.q_position[index], column)

        none = jnp.full((plan.queries, 1), -1, jnp.int32)
        refs.q_column[...] = lax.fori_loop(row * plan.qtok, refs.end[row] * plan.qtok, one, none)


def _clear_unused(refs: Refs, plan: Plan, half: jax.Array, place: jax.Array) -> None:
    """0 * NaN is NaN: V of slots that are not used must be 0."""
    count = refs.page_count[half * plan.block_pages + place]

    @pl.when(count < plan.page_tokens)
    def _():
        if plan.flat:
            values = refs.buffer[half, place]
            slot = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            keep = (slot < plan.kvh * plan.page_tokens) | (slot % plan.page_tokens < count)
            refs.buffer[half, place] = jnp.where(keep, values, jnp.zeros_like(values))
        else:
            values = refs.buffer[half, place, V]
            slot = lax.broadcasted_iota(jnp.int32, values.shape, 1)
            refs.buffer[half, place, V] = jnp.where(slot < count, values, jnp.zeros_like(values))


def _positions(refs: Refs, plan: Plan, half: jax.Array, base: jax.Array) -> jax.Array:
    """`[1, tokens]`: the position of each slot of the pages from `base` on; of an unused one, beyond all."""
    token = lax.broadcasted_iota(jnp.int32, (1, plan.fold_pages * plan.page_tokens), 1)
    if plan.flat:  # tokens lie slot by slot
        page, slot = token % plan.fold_pages, token // plan.fold_pages
    else:
        page, slot = token // plan.page_tokens, token % plan.page_tokens
    beyond = jnp.int32(2**31 - 1)

    def one(place, position):
        at = half * plan.block_pages + base + place
        inside = (page == place) & (slot < refs.page_count[at])
        return jnp.where(inside, refs.page_position[at] + slot, position)

    return lax.fori_loop(0, plan.fold_pages, one, jnp.full(token.shape, beyond, jnp.int32))


def _values(refs: Refs, plan: Plan, half: jax.Array, base: jax.Array, kv: int, head: jax.Array | int) -> jax.Array:
    """`[tokens, pool_dim]`: K or V of one head of the pages from `base` on."""
    pages = pl.ds(base, plan.fold_pages)
    if plan.flat:
        rows = [(kv * plan.kvh + head) * plan.page_tokens + slot for slot in range(plan.page_tokens)]
        return jnp.concatenate([refs.buffer[half, pages, row] for row in rows])
    return refs.buffer[half, pages, kv, head].reshape(plan.fold_pages * plan.page_tokens, -1)


def _fold_head(refs: Refs, plan: Plan, unit, half, base, head, visible) -> None:
    dtype = jnp.promote_types(refs.q.dtype, refs.buffer.dtype)
    # float32 inputs mean that somebody checks digits; products of bfloat16 are exact in the hardware's default.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    q = refs.q[unit, head].astype(dtype)
    k = _values(refs, plan, half, base, K, head).astype(dtype)
    v = _values(refs, plan, half, base, V, head).astype(dtype)
    score = lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )  # [queries, tokens]
    score *= plan.scale
    if plan.soft_cap is not None:
        score = plan.soft_cap * jnp.tanh(score * (1 / plan.soft_cap))
    score = jnp.where(visible, score, NEG)
    before = refs.top[head]
    top = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
    # A query that has seen nothing yet has top == NEG and would weigh hidden keys exp(0): its shift is 0 instead.
    weight = jnp.exp(score - jnp.where(top == NEG, 0.0, top)[:, :1])
    decay = jnp.exp(before - top)
    refs.top[head] = top
    refs.total[head] = refs.total[head] * decay + jnp.sum(weight, axis=1, keepdims=True)
    product = lax.dot_general(
        weight.astype(dtype), v, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    refs.acc[head] = refs.acc[head] * decay[:, :1] + product


def _over_heads(plan: Plan, body) -> None:
    """Heads are unrolled, so that one's products overlap another's exponentials, unless one alone has work enough;
    and not so many that the program grows without bound."""
    most = min(MAX_UNROLLED_HEADS, max(1, MAX_UNROLLED_QUERIES // plan.queries))
    unrolled = max(n for n in range(1, most + 1) if plan.kvh % n == 0)
    if plan.flat or unrolled == plan.kvh:  # flat pages index rows of a tile by the head: it must be static
        for head in range(plan.kvh):
            body(head)
        return

    def some(index, _):
        for head in range(unrolled):
            body(index * unrolled + head)

    lax.fori_loop(0, plan.kvh // unrolled, some, None)


def _fold_block(refs: Refs, plan: Plan, unit: jax.Array, half: jax.Array, row: jax.Array) -> None:
    single = plan.unit_rows * plan.qtok == 1
    if not single:
        _set_q_column(refs, plan, row)

    def some(index, _):
        base = index * plan.fold_pages

        @pl.when(refs.block_tokens[half] < plan.block_pages * plan.page_tokens)
        def _():
            lax.fori_loop(0, plan.fold_pages, lambda p, _: _clear_unused(refs, plan, half, base + p), None)

        position = _positions(refs, plan, half, base)
        q_position = refs.q_position[row] if single else refs.q_column[...]
        visible = (position <= q_position) & (position > q_position - refs.scalar[WINDOW])
        visible = jnp.broadcast_to(visible, (plan.queries, position.shape[1]))
        _over_heads(plan, lambda head: _fold_head(refs, plan, unit, half, base, head, visible))

    lax.fori_loop(0, pl.cdiv(refs.block_size[half], plan.fold_pages), some, None)


def _finish(refs: Refs, plan: Plan, unit: jax.Array, head: jax.Array | int) -> None:
    seen = refs.total[head] > 0  # [queries, LANES], the same in every lane
    total = jnp.where(seen, refs.total[head], 1.0)
    refs.out[unit, head] = jnp.where(seen[:, :1], refs.acc[head], 0.0) / total[:, :1]
    lse = jnp.where(seen, refs.top[head] + jnp.log(total), NEG)
    for base in range(0, plan.queries, LANES):  # queries lie on sublanes: their diagonal brings them to lanes
        size = min(LANES, plan.queries - base)
        part = lse[base : base + size]
        diagonal = lax.broadcasted_iota(jnp.int32, part.shape, 0) == lax.broadcasted_iota(jnp.int32, part.shape, 1)
        refs.lse[unit, head, 0, base : base + size] = jnp.sum(jnp.where(diagonal, part, 0.0), axis=0)[:size]


def kernel(*refs_in_order: jax.Ref, plan: Plan) -> None:
    """One step of the grid: `step_units` units."""
    refs = Refs(*refs_in_order)

    @pl.when(pl.program_id(0) == 0)
    def _():
        start(refs, plan)

    def one_unit(index, _):
        unit = pl.program_id(0) * plan.step_units + index
        refs.top[...] = jnp.full(refs.top.shape, NEG, jnp.float32)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
        refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)

        def block(row):
            half = refs.state[TURN]
            produce(refs, plan, 1 - half)
            _wait(refs, half)
            _fold_block(refs, plan, index, half, row)
            refs.state[TURN] = 1 - half
            return refs.block_row[1 - half]

        mine = lambda row: (row < plan.num_rows) & (row // plan.unit_rows == unit)
        lax.while_loop(mine, block, refs.block_row[refs.state[TURN]])
        _over_heads(plan, lambda head: _finish(refs, plan, index, head))

    lax.fori_loop(0, plan.step_units, one_unit, None)
