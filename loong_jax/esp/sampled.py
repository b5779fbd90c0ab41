"""What a step gives for its rows and for the tokens it scores, as integers that a host reads in one piece.

What it is: from logits to `[row, 2 + 2 * num_top]` of (token, log-probability bits, likeliest tokens, their bits), and
the log-probabilities of a whole chunk, tile by tile. What it is not: the sampling law (`loong_jax/model/sampling.py`).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from loong_jax.esp.layout import StepShape, bits_to_float, float_to_bits
from loong_jax.model.adjust import adjust
from loong_jax.model.sampling import Params, likeliest, logprobs_of, sample

SCORE_TILE = 64
"""Tokens whose logits are held at once: memory does not grow with the chunk."""


def sampled_rows(
    logits: Float32[Array, "row vocab"],
    fields: dict[str, Array],
    adjustment: dict[str, Array],
    position: Int32[Array, " row"],
    shape: StepShape,
) -> Int32[Array, "row size"]:
    """`fields`: SAMPLING_FIELDS of each row; `adjustment`: of `adjust_layout`; `position`: of the sampled tokens.
    Log-probabilities are under the raw logits."""
    params = Params(
        bits_to_float(fields["temperature"]),
        fields["top_k"],
        bits_to_float(fields["top_p"]),
        bits_to_float(fields["min_p"]),
        fields["seed"].astype(jnp.uint32),
        position,
    )
    tokens = sample(adjust(logits, adjustment), params)
    top, top_logprobs = likeliest(logits, shape.num_top, jnp.any(fields["num_top"] > 0))
    logprobs = logprobs_of(logits, tokens)
    return jnp.concatenate(
        [tokens[:, None], float_to_bits(logprobs)[:, None], top, float_to_bits(top_logprobs)], axis=1
    )


def scored_tokens(
    logits_of: Callable[[Array], Float32[Array, "tok vocab"]],
    hidden: Array,
    fields: dict[str, Array],
    shape: StepShape,
) -> Int32[Array, "tok size"]:
    """Bits of the log-probability of each token's target, likeliest tokens and their bits, for the first
    `num_score_tiles` tiles of `hidden` `[tok, d]`; zeros behind them. `logits_of` maps some rows of it to logits."""
    num_tokens = hidden.shape[0]
    tile = min(SCORE_TILE, num_tokens)
    wanted = fields["num_score_top"] > 0

    def body(index, out):
        first = jnp.minimum(index * tile, num_tokens - tile)
        logits = logits_of(lax.dynamic_slice_in_dim(hidden, first, tile))
        targets = lax.dynamic_slice_in_dim(fields["targets"], first, tile)
        top, top_logprobs = likeliest(logits, shape.num_top, wanted)
        bits = float_to_bits(logprobs_of(logits, targets))
        part = jnp.concatenate([bits[:, None], top, float_to_bits(top_logprobs)], axis=1)
        return lax.dynamic_update_slice_in_dim(out, part, first, 0)

    out = jnp.zeros((num_tokens, 1 + 2 * shape.num_top), jnp.int32)
    return lax.fori_loop(0, fields["num_score_tiles"], body, out)
