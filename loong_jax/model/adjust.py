"""Adjusted logits: biases, bans, penalties and grammars, as data of a step (DESIGN 5).

What it is: one function on rows of logits, and the fields of `adjust_layout`. Order as in vLLM: addends first (logit
bias, bans), then the repetition penalty on every token seen (positive logits are divided, others multiplied), then what
the frequency and presence penalties take off; last, what a grammar does not allow goes out of reach of all of them. A
batch that adjusts nothing pays a comparison.
What it is not: who counts tokens (`loong_jax/row_adjust.py`), or sampling (`sampling.py`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from loong_jax.row_adjust import BAN

TILE = 256
"""Entries that one round of the loops takes."""


def adjust(logits: Float32[Array, "row vocab"], fields: dict[str, Array]) -> Float32[Array, "row vocab"]:
    """`fields`: `num_entries`, `repetition`, `constrained` `[row]`, `entries` `[row, 3, entry]`, `seen`, `allowed`
    `[row, word]`, all int32."""
    return lax.cond(
        jnp.any((fields["num_entries"] > 0) | (fields["repetition"] != 0) | (fields["constrained"] != 0)),
        lambda: _adjust(logits, fields),
        lambda: logits,
    )


def _adjust(logits, fields):
    penalty = lax.bitcast_convert_type(fields["repetition"], jnp.float32)
    penalty = jnp.where(_unpack(fields["seen"], logits.shape[1]) & (penalty != 0)[:, None], penalty[:, None], 1.0)
    logits = _add(logits, fields, line=1)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = _add(logits, fields, line=2)
    constrained = fields["constrained"] != 0
    return lax.cond(jnp.any(constrained), lambda: _constrain(logits, constrained, fields["allowed"]), lambda: logits)


def _constrain(logits, constrained, allowed):
    return jnp.where(constrained[:, None] & ~_unpack(allowed, logits.shape[1]), BAN, logits)


def _unpack(words: Int32[Array, "row word"], vocab_size: int) -> Array:
    """For each token t: bit t // words of word t % words."""
    bits = (words[:, None, :] >> jnp.arange(32, dtype=jnp.int32)[:, None]) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != 0


def _add(logits: Float32[Array, "row vocab"], fields: dict[str, Array], line: int) -> Float32[Array, "row vocab"]:
    """Add one line of the entries, tile by tile, as many as the fullest row has."""
    entries, count = fields["entries"], fields["num_entries"]
    num_rows, _, num_entries = entries.shape
    tile = min(TILE, num_entries)
    row = jnp.arange(num_rows)[:, None]

    def body(index, logits):
        first = jnp.minimum(index * tile, num_entries - tile)  # the last tile may overlap the one before
        part = lax.dynamic_slice_in_dim(entries, first, tile, axis=2)
        entry = first + jnp.arange(tile)
        used = (entry >= index * tile) & (entry < count[:, None])
        token = jnp.where(used, part[:, 0], logits.shape[1])  # out of range: dropped
        value = lax.bitcast_convert_type(part[:, line], jnp.float32)
        return logits.at[row, token].add(value, mode="drop")

    return lax.fori_loop(0, -(-jnp.max(count) // tile), body, logits)
