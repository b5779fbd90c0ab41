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
    """`top`: largest score so far (NEG at first); `total`: sum of exp(score - top); `acc`: the weighted sum of V."""

    top: Float[Array, "kvh query"]
    total: Float[Array, "kvh query"]
    acc: Float[Array, "kvh query dim"]


def varying_zero(*arrays: Shaped[Array, "..."]) -> Float[Array, ""]:
    """A zero that varies over the mesh axes any of `arrays` varies over (inside shard_map a loop's carry must start
    as it ends). Never reads NaN: XLA folds it away."""
    zero = jnp.zeros((), jnp.bool_)
    for array in arrays:
        zero |= (array[(0,) * array.ndim] == 0) & False
    return zero.astype(jnp.float32)


def start(kvh: int, num_queries: int, dim: int, zero: Float[Array, ""]) -> Running:
    """The state before any tile; `zero` comes from `varying_zero`."""
    return Running(
        jnp.full((kvh, num_queries), NEG) + zero,
        jnp.zeros((kvh, num_queries)) + zero,
        jnp.zeros((kvh, num_queries, dim)) + zero,
    )


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
    # float32 inputs mean that somebody checks digits; products of bfloat16 are exact in the hardware's default.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    score = jnp.einsum("kqd,ksd->kqs", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(visible, score, NEG)
    top = jnp.maximum(running.top, score.max(axis=-1))
    # A query that has seen nothing yet has top == NEG and would weigh hidden keys exp(0): its shift is 0 instead.
    weight = jnp.exp(score - jnp.where(top == NEG, 0.0, top)[..., None])
    decay = jnp.exp(running.top - top)
    acc = jnp.einsum("kqs,ksd->kqd", weight.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return Running(top, running.total * decay + weight.sum(axis=-1), running.acc * decay[..., None] + acc)


def finish(running: Running, num_tokens: int) -> Partial:
    """`[kvh, grp * tok, ...]` to a partial `[tok, head, ...]`."""
    kvh, num_queries, dim = running.acc.shape
    seen = running.total > 0
    total = jnp.where(seen, running.total, 1.0)
    out = (running.acc / total[..., None]).reshape(kvh, num_queries // num_tokens, num_tokens, dim)
    lse = jnp.where(seen, running.top + jnp.log(total), NEG).reshape(out.shape[:-1])
    heads = kvh * out.shape[1]
    return Partial(out.transpose(2, 0, 1, 3).reshape(num_tokens, heads, dim), lse.transpose(2, 0, 1).reshape(-1, heads))
