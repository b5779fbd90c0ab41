"""Sampling of the next token: greedy, temperature, top-k, top-p (DESIGN 5).

What it is: one function on rows of logits. Noise is keyed by (seed, position of the sampled token), so placement,
batch mix and DoP change nothing. Filters follow the usual order: top-k, then top-p over what top-k left; ties with
the last token kept are kept.
What it is not: grammar masks and penalties, which come as data of a full sampling program.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

PREFILTER = 256
"""A row whose top-k or nucleus fits in this many tokens needs no sort of the vocabulary."""


def sample(
    logits: Float32[Array, "row vocab"],
    temperature: Float32[Array, " row"],
    top_k: Int32[Array, " row"],
    top_p: Float32[Array, " row"],
    seed: UInt32[Array, " row"],
    position: Int32[Array, " row"],
) -> tuple[Int32[Array, " row"], Float32[Array, " row"]]:
    """Tokens, and their log-probabilities under the raw logits (no temperature, no filter).

    `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` switch the filters off. `position` is the one of the
    sampled token. A batch of greedy rows costs an argmax, one without filters no sort.
    """
    tokens = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: _sample_rows(logits, temperature, top_k, top_p, seed, position),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _sample_rows(logits, temperature, top_k, top_p, seed, position) -> Int32[Array, " row"]:
    vocab_size = logits.shape[1]
    # Shift before dividing: a tiny temperature must not overflow.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    filtered = (top_k > 0) | (top_p < 1)
    least = jax.lax.cond(
        jnp.any(filtered & (temperature > 0)),
        lambda: _least_kept(scaled, jnp.where(top_k > 0, top_k, vocab_size), top_p),
        lambda: jnp.full_like(temperature, -jnp.inf),
    )
    kept = ~filtered[:, None] | (scaled >= least[:, None])
    noise = jax.vmap(lambda s, p: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), p), (vocab_size,)))(
        seed, position
    )
    noisy = jnp.where(kept, scaled + noise, -jnp.inf)
    return jnp.argmax(jnp.where(temperature[:, None] > 0, noisy, logits), axis=-1).astype(jnp.int32)


def _least_kept(
    scaled: Float32[Array, "row vocab"], top_k: Int32[Array, " row"], top_p: Float32[Array, " row"]
) -> Float32[Array, " row"]:
    """The smallest scaled logit that top-k, then top-p, keep."""
    head = jax.lax.top_k(scaled, min(PREFILTER, scaled.shape[1]))[0]
    total = jnp.exp(jax.nn.logsumexp(scaled, axis=-1))
    least, fits = _least_in_head(head, total, top_k, top_p)
    return jax.lax.cond(
        jnp.all(fits | ((top_k >= scaled.shape[1]) & (top_p >= 1))),
        lambda: least,
        lambda: _least_in_head(-jnp.sort(-scaled, axis=-1), total, top_k, top_p)[0],
    )


def _least_in_head(
    head: Float32[Array, "row head"],
    total: Float32[Array, " row"],
    top_k: Int32[Array, " row"],
    top_p: Float32[Array, " row"],
) -> tuple[Float32[Array, " row"], Bool[Array, " row"]]:
    """The smallest value kept among the largest ones (`head`, descending), and whether the answer lies within it."""
    in_top_k = jnp.arange(head.shape[1]) < top_k[:, None]
    mass = jnp.cumsum(jnp.where(in_top_k, jnp.exp(head), 0.0), axis=-1)
    of_top_k = jnp.where(top_k <= head.shape[1], mass[:, -1], total)
    before = mass - jnp.where(in_top_k, jnp.exp(head), 0.0)
    keep = in_top_k & ((before < (top_p * of_top_k)[:, None]) | (jnp.arange(head.shape[1]) == 0))
    fits = (top_k <= head.shape[1]) | (mass[:, -1] >= top_p * of_top_k)
    return jnp.min(jnp.where(keep, head, jnp.inf), axis=-1), fits
