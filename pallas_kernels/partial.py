"""Partials: attention over part of a context, and the law by which parts merge exactly.

A `Partial` is softmax attention over a subset of the visible keys with the log of its normaliser. Merging partials of
disjoint subsets, in any order and grouping, gives the attention over their union (up to f32 rounding), so KV may lie
on any instances in any split (DESIGN section 2).

The floor is finite on purpose: with -inf the difference of two empty parts is NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NEG = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The `lse` of a part in which nothing is visible. Differences of two such values stay finite."""


class Partial(NamedTuple):
    """`out`: normalised attention over the part; `lse`: log of the sum of exp(score) (natural log). Both float32.

    Nothing visible: `out == 0` and `lse == NEG`.
    """

    out: Float[Array, "*tok head dim"]
    lse: Float[Array, "*tok head"]


def empty(shape: tuple[int, ...]) -> Partial:
    """The neutral element of `merge`, for `out` of shape `[*tok, head, dim]`."""
    return Partial(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], NEG, jnp.float32))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint parts. Two empty parts stay empty, with `out` 0."""
    top = jnp.maximum(a.lse, b.lse)
    weight_a, weight_b = jnp.exp(a.lse - top), jnp.exp(b.lse - top)
    total = weight_a + weight_b
    # One division of the small weights instead of the large outputs; an empty part has weight exactly 0 or out 0.
    out = (weight_a / total)[..., None] * a.out + (weight_b / total)[..., None] * b.out
    return Partial(out, top + jnp.log(total))


def merge_many(parts: Partial) -> Partial:
    """Merges along a leading axis: `out [part, *tok, head, dim]`, `lse [part, *tok, head]`."""
    top = parts.lse.max(axis=0)
    weight = jnp.exp(parts.lse - top)
    total = weight.sum(axis=0)
    out = jnp.einsum("n...,n...d->...d", weight / total, parts.out, precision=jax.lax.Precision.HIGHEST)
    return Partial(out, top + jnp.log(total))
