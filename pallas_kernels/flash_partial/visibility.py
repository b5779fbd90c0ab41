"""Which blocks of queries may see which blocks of keys: what lets `flash_partial` leave out the rest.

A block of tokens is summed up by its *extent* in (request, position). All judgements are on extents, so they cost what
blocks number, not tokens, and hold for any order of tokens. What it is not: the mask inside a block.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_BIG = jnp.iinfo(jnp.int32).max


class Extent(NamedTuple):
    """What a block of tokens covers: its smallest and largest (request, position), compared request first."""

    low_req: Int[Array, " block"]
    low_pos: Int[Array, " block"]
    high_req: Int[Array, " block"]
    high_pos: Int[Array, " block"]
    min_pos: Int[Array, " block"]
    max_pos: Int[Array, " block"]
    padded: Bool[Array, " block"]  # holds padding


def extents(req: Int[Array, "block tok"], pos: Int[Array, "block tok"]) -> Extent:
    """Padding is left out; a block of padding has low_req > high_req."""
    valid = req >= 0
    low_req = jnp.where(valid, req, _BIG).min(axis=1)
    high_req = jnp.where(valid, req, -1).max(axis=1)
    return Extent(
        low_req,
        jnp.where(req == low_req[:, None], pos, _BIG).min(axis=1),
        high_req,
        jnp.where(valid & (req == high_req[:, None]), pos, -1).max(axis=1),
        jnp.where(valid, pos, _BIG).min(axis=1),
        jnp.where(valid, pos, -1).max(axis=1),
        ~valid.all(axis=1),
    )


def may_see(q: Extent, kv: Extent, window: int | Array | None) -> Bool[Array, "qblock kvblock"]:
    """False only where no query of the block sees any key of the block.

    A visible key is never above its query in (request, position) order, so a key block whose lowest is above the query
    block's highest is out: this keeps neighbouring requests of a ragged batch apart. The window bounds the other side.
    """
    q = Extent(*(a[:, None] for a in q))
    above = (kv.low_req > q.high_req) | ((kv.low_req == q.high_req) & (kv.low_pos > q.high_pos))
    hidden = above | (kv.high_req < q.low_req) | (kv.min_pos > q.max_pos) | (q.high_req < 0) | (kv.high_req < 0)
    if window is not None:
        hidden |= q.min_pos - kv.max_pos >= window
        hidden |= (kv.high_req == q.low_req) & (q.low_pos - kv.high_pos >= window)
    return ~hidden


def sees_all(q: Extent, kv: Extent, window: int | Array | None) -> Bool[Array, "qblock kvblock"]:
    """True only where every query of the block sees every key of the block, so that no mask is needed."""
    q = Extent(*(a[:, None] for a in q))
    one_request = (q.low_req == q.high_req) & (kv.low_req == kv.high_req) & (q.low_req == kv.low_req)
    seen = one_request & ~q.padded & ~kv.padded & (kv.max_pos <= q.min_pos)
    return seen if window is None else seen & (q.max_pos - kv.min_pos < window)


def block_lists(seen: Bool[Array, "qblock kvblock"]) -> tuple[Int[Array, "qblock kvblock"], Int[Array, " qblock"]]:
    """For each query block the indices of its key blocks, first `count` of the row, ascending."""
    num_q, num_kv = seen.shape
    place = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, num_kv)
    rows = jnp.broadcast_to(jnp.arange(num_q)[:, None], seen.shape)
    columns = jnp.broadcast_to(jnp.arange(num_kv), seen.shape)
    return jnp.zeros(seen.shape, jnp.int32).at[rows, place].set(columns, mode="drop"), seen.sum(axis=1)
