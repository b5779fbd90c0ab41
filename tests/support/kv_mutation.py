"""What a wrong KV token does to the model: the ruler for the power of fixtures.

A mutation spoils one KV token, at one layer, as one later query sees it: the token `distance` before the query is
hidden, counted twice, rotated by one position too many, or replaced by its neighbour. All queries are done in one pass,
each with its own mutated token, so all positions of a long prompt are tried at the price of a forward pass. All else in
the query's context is left right, as when one decode step reads a spoilt page; its later layers follow from that.
"""

from enum import Enum
from functools import partial

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Int

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import Params, decode_stack, layer_window, logits
from loong_jax.model.rope import rotate, rotation

QUERY_BLOCK = 256


class Mutation(Enum):
    HIDE = 0
    DOUBLE = 1
    SHIFT = 2  # rotated as if it stood one position later
    NEIGHBOUR = 3  # the KV of the position before (of the one after, for the first token)


def attend_replaced(
    config: ModelConfig,
    layer: int,
    q: Float[Array, "tok head dim"],
    k: Float[Array, "tok kvh dim"],
    v: Float[Array, "tok kvh dim"],
    column: Int[Array, " tok"],
    k_own: Float[Array, "tok kvh dim"],
    v_own: Float[Array, "tok kvh dim"],
    bias: Float[Array, " tok"],
) -> Float[Array, "tok head dim"]:
    """The layer's attention in which query t sees `k_own[t], v_own[t]` in the place of token `column[t]` (nothing is
    replaced where it is negative), with `bias[t]` added to that score."""
    num_tokens, _, dim = q.shape
    window = layer_window(config, layer) or num_tokens

    def scored(products):
        scores = products * config.attention_scale
        cap = config.attn_soft_cap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    block = min(QUERY_BLOCK, num_tokens)
    assert num_tokens % block == 0

    def attend_block(args):
        first, rows, column, k_own, v_own, bias = args
        scores = scored(jnp.einsum("tkgd,skd->kgts", rows, k))
        distance = first + jnp.arange(block)[:, None] - jnp.arange(num_tokens)[None, :]
        visible = (distance >= 0) & (distance < window)
        replaced = jnp.arange(num_tokens)[None, :] == column[:, None]
        own = scored(jnp.einsum("tkgd,tkd->kgt", rows, k_own)) + bias
        scores = jnp.where(replaced, own[..., None], scores)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        # A query that sees nothing at all (the first one, hidden from itself) gets zero.
        weights = jnp.nan_to_num(weights)
        own_weight = jnp.sum(jnp.where(replaced, weights, 0.0), axis=-1)
        others = jnp.einsum("kgts,skd->tkgd", jnp.where(replaced, 0.0, weights), v)
        return others + jnp.einsum("kgt,tkd->tkgd", own_weight, v_own)

    split = lambda x: x.reshape(num_tokens // block, block, *x.shape[1:])
    grouped = q.reshape(num_tokens, k.shape[1], -1, dim)
    out = jax.lax.map(
        attend_block,
        (jnp.arange(0, num_tokens, block), *(split(x) for x in (grouped, column, k_own, v_own, bias))),
    )
    return out.reshape(q.shape)


@partial(jax.jit, static_argnames="config")
def _mutated(params: Params, config: ModelConfig, tokens, kv, layer, mutation, distance):
    """Log-probabilities when, at `layer`, query t sees token t - distance mutated; `kv` is that of the right run."""
    positions = jnp.arange(tokens.shape[0])
    target = positions - distance
    source = jnp.where(mutation == Mutation.NEIGHBOUR.value, jnp.where(target > 0, target - 1, 1), target)
    lengths = jnp.full_like(positions, tokens.shape[0])

    def attend(kv, index, q, k, v):
        own = config.window_rope if config.window_rope is not None and config.windows[index] else config.rope
        plain = msgspec.structs.replace(own, attention_factor=1.0)  # the right keys are scaled already
        later = rotation(plain, config.head_dim, jnp.ones_like(positions), lengths)
        right_k, right_v = kv[index]
        k_spoilt, v_spoilt = right_k[source], right_v[source]
        shifted = rotate(k_spoilt, later)
        k_spoilt = jnp.where(mutation == Mutation.SHIFT.value, shifted, k_spoilt)
        bias = jnp.where(mutation == Mutation.HIDE.value, -jnp.inf, 0.0)
        bias = jnp.where(mutation == Mutation.DOUBLE.value, jnp.log(2.0), bias)
        here = index == layer
        out = attend_replaced(
            config,
            index,
            q,
            right_k,
            right_v,
            jnp.where(here, target, positions),
            jnp.where(here, k_spoilt, k),
            jnp.where(here, v_spoilt, v),
            jnp.where(here, bias, jnp.zeros(tokens.shape)),
        )
        return out, kv

    hidden, _ = decode_stack(params, config, tokens, positions, attend, kv, rope_len=lengths)
    return jax.nn.log_softmax(logits(params, config, hidden), axis=-1)


@partial(jax.jit, static_argnames="config")
def right_run(params: Params, config: ModelConfig, tokens: Int[Array, " tok"]):
    """Log-probabilities and the list of (k, v) of every layer, nothing mutated. As in `mutated_change`, the number of
    tokens is at most QUERY_BLOCK or a multiple of it."""
    nothing = jnp.full(tokens.shape, -1)

    def attend(kv, layer, q, k, v):
        return attend_replaced(config, layer, q, k, v, nothing, k, v, jnp.zeros(tokens.shape)), [*kv, (k, v)]

    positions, lengths = jnp.arange(tokens.shape[0]), jnp.full_like(nothing, tokens.shape[0])
    hidden, kv = decode_stack(params, config, tokens, positions, attend, [], rope_len=lengths)
    return jax.nn.log_softmax(logits(params, config, hidden), axis=-1), kv


def mutated_change(
    params: Params, config: ModelConfig, tokens, right, layer: int, mutation: Mutation, distance: int
) -> np.ndarray:
    """f32[tok - distance]: by mutated position, the largest change of a log-probability of the query `distance` later.

    `right`: what `right_run` gave; `params` have their layers as a list.
    """
    logprobs, kv = right
    mutated = _mutated(params, config, tokens, kv, layer, mutation.value, distance)
    return np.asarray(jnp.max(jnp.abs(mutated - logprobs), axis=-1))[distance:]
