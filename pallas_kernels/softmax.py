"""The online softmax that the blockwise paths share: one tile of keys folded into running (top, total, acc).

What it is not: a partial (`partial.py`); `finish` makes one. Head layout inside is `[kvh, grp * tok, ...]`, so grouped
queries read each key once and K, V are never repeated.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels.partial import NEG, Partial


class Running(NamedTuple):
    """`top`: largest score so far (NEG at first); `total`: sum of exp(score - top); `acc`: the weighted sum of V. In
    front, where several rows are folded at once, their axis."""

    top: Float[Array, "*row kvh query"]
    total: Float[Array, "*row kvh query"]
    acc: Float[Array, "*row kvh query dim"]


def varying_zero(*arrays: Shaped[Array, "..."]) -> Float[Array, ""]:
    """A zero that varies over the mesh axes any of `arrays` varies over (inside shard_map a loop's carry must start
    as it ends). Never reads NaN: XLA folds it away."""
    zero = jnp.zeros((), jnp.bool_)
    for array in arrays:
        zero |= (array[(0,) * array.ndim] == 0) & False
    return zero.astype(jnp.float32)


def start(shape: tuple[int, ...], dim: int, zero: Float[Array, ""]) -> Running:
    """The state before any tile; `shape`: that of `top`; `zero` comes from `varying_zero`."""
    return Running(jnp.full(shape, NEG) + zero, jnp.zeros(shape) + zero, jnp.zeros((*shape, dim)) + zero)


def _products(subscripts: str, a: Array, b: Array) -> Float[Array, "..."]:
    # float32 inputs mean that somebody checks digits; products of bfloat16 are exact in the hardware's default.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(subscripts: str, q: Array, k: Array, visible: Array, scale: float, soft_cap: float | None) -> Array:
    score = _products(subscripts, q, k) * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    return jnp.where(visible, score, NEG)


def _shift(top: Array) -> Array:
    """What scores are lowered by. A query that has seen nothing yet has top == NEG and would weigh hidden keys exp(0):
    its shift is 0 instead."""
    return jnp.where(top == NEG, 0.0, top)[..., None]


def fold(
    running: Running,
    q: Float[Array, "kvh query dim"],
    k: Float[Array, "kvh ctx dim"],
    v: Float[Array, "kvh ctx dim"],
    visible: Bool[Array, "query ctx"],
    *,
    scale: float,
    soft_cap: float | None,
) -> Running:
    """Folds one tile in. V must be finite also where no query looks (0 * NaN is NaN); hidden K may be anything."""
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    score = _scores("kqd,ksd->kqs", q, k, visible, scale, soft_cap)
    top = jnp.maximum(running.top, score.max(axis=-1))
    weight = jnp.exp(score - _shift(top))
    decay = jnp.exp(running.top - top)
    acc = _products("kqs,ksd->kqd", weight.astype(dtype), v)
    return Running(top, running.total * decay + weight.sum(axis=-1), running.acc * decay[..., None] + acc)


def fold_tiles(
    running: Running,
    here: Bool[Array, "row tile"],
    q: Float[Array, "tile kvh query dim"],
    k: Float[Array, "tile kvh ctx dim"],
    v: Float[Array, "tile kvh ctx dim"],
    visible: Bool[Array, "tile query ctx"],
    *,
    scale: float,
    soft_cap: float | None,
) -> Running:
    """Folds several tiles into several rows at once: tile `t`, with its own queries, into the row where `here[:, t]`.

    `running`: `[row, kvh, query, ...]`. Sums over the tiles of a row are products with `here`: scatters are slow loops
    on CPU. Otherwise as `fold`.
    """
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    score = _scores("tkqd,tksd->tkqs", q, k, visible[:, None], scale, soft_cap)
    of_row = here[:, :, None, None]
    top = jnp.maximum(running.top, jnp.where(of_row, score.max(axis=-1), NEG).max(axis=1))
    # The top of a tile's row; exact, as it is one of the tops times one, and zeros.
    weight = jnp.exp(score - _shift(jnp.where(of_row, top[:, None], 0.0).sum(axis=0)))
    weight = jnp.where(visible[:, None], weight, 0.0)  # a tile of no row has shift 0
    decay = jnp.exp(running.top - top)
    total = jnp.where(of_row, weight.sum(axis=-1), 0.0).sum(axis=1)
    acc = _products("rt,tkqd->rkqd", here.astype(jnp.float32), _products("tkqs,tksd->tkqd", weight.astype(dtype), v))
    return Running(top, running.total * decay + total, running.acc * decay[..., None] + acc)


def finish(running: Running, num_tokens: int) -> Partial:
    """`[kvh, grp * tok, ...]` to a partial `[tok, head, ...]`."""
    kvh, num_queries, dim = running.acc.shape
    seen = running.total > 0
    total = jnp.where(seen, running.total, 1.0)
    out = (running.acc / total[..., None]).reshape(kvh, num_queries // num_tokens, num_tokens, dim)
    lse = jnp.where(seen, running.top + jnp.log(total), NEG).reshape(out.shape[:-1])
    heads = kvh * out.shape[1]
    return Partial(out.transpose(2, 0, 1, 3).reshape(num_tokens, heads, dim), lse.transpose(2, 0, 1).reshape(-1, heads))
