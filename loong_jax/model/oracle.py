"""The single-device oracle: what every elastic execution must reproduce.

What it is: the decoder with exact dense causal attention, queries in blocks so that some
thousand tokens fit.
What it is not: fast, paged, or a user of any kernel; it shares nothing with `pallas_kernels` or `esp`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import Attend, Params, decode_stack, logits

QUERY_BLOCK = 256


def causal_attention(
    q: Float[Array, "tok head dim"],
    k: Float[Array, "tok kvh dim"],
    v: Float[Array, "tok kvh dim"],
    *,
    scale: float | None = None,
    window: int | Array | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "tok head dim"]:
    """Exact softmax attention of each token to itself and all before it, in float32. The number of tokens is at most
    QUERY_BLOCK or a multiple of it. `scale`: of scores, `dim ** -0.5` if None. `window`: tokens it sees, with itself.
    `soft_cap`: scores become `soft_cap * tanh(score / soft_cap)`."""
    num_tokens, num_heads, dim = q.shape
    block = min(QUERY_BLOCK, num_tokens)
    factor = dim**-0.5 if scale is None else scale
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)

    def attend_block(args):
        first, rows = args  # rows: [block, kvh, grp, dim]
        scores = jnp.einsum("tkgd,skd->kgts", rows, k, precision="highest") * factor
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        distance = first + jnp.arange(block)[:, None] - jnp.arange(num_tokens)[None, :]
        visible = (distance >= 0) & (distance < (num_tokens if window is None else window))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,skd->tkgd", weights, v, precision="highest")

    grouped = q.astype(jnp.float32).reshape(num_tokens // block, block, k.shape[1], -1, dim)
    out = jax.lax.map(attend_block, (jnp.arange(0, num_tokens, block), grouped))
    return out.reshape(num_tokens, num_heads, dim).astype(q.dtype)


def model_attention(config: ModelConfig) -> Attend:
    """The attention that `config` asks for, over the tokens at hand; the carry is passed on."""

    def attend(carry, layer, q, k, v):
        window = config.windows[layer] or None if config.windows else None
        out = causal_attention(q, k, v, scale=config.attention_scale, window=window, soft_cap=config.attn_soft_cap)
        return out, carry

    return attend


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: ModelConfig, tokens: Array, rope_len: Array) -> Array:
    lengths = jnp.broadcast_to(rope_len, tokens.shape)
    positions = jnp.arange(tokens.shape[0])
    hidden, _ = decode_stack(params, config, tokens, positions, model_attention(config), None, rope_len=lengths)
    return logits(params, config, hidden)


class Oracle:
    """Logits and log-probabilities of whole token sequences on one device."""

    def __init__(self, config: ModelConfig, params: Params):
        """`params`: the tree of one tensor-parallel rank at tp = 1, without its tp axis, layers as a list."""
        self.config = config
        self.params = params

    def logprobs(self, tokens: Sequence[int] | np.ndarray, rope_len: int | None = None) -> np.ndarray:
        """f32[len(tokens), vocab_size]; row p is the distribution of token p + 1. `rope_len`: the length the request
        was admitted with, where the rotary embedding depends on it (None: that of `tokens`)."""
        rows = self.logits(tokens, rope_len)
        shifted = rows - rows.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def logits(self, tokens: Sequence[int] | np.ndarray, rope_len: int | None = None) -> np.ndarray:
        """f32[len(tokens), vocab_size]; row p speaks of token p + 1."""
        tokens = np.asarray(tokens, np.int32)
        # Padding on the right is invisible to causal attention; few lengths mean few compilations.
        padded = 16
        while padded < min(len(tokens), QUERY_BLOCK):
            padded *= 2
        padded = -(-len(tokens) // padded) * padded
        padded_tokens = jnp.asarray(np.pad(tokens, (0, padded - len(tokens))))
        rows = _logits(self.params, self.config, padded_tokens, jnp.int32(rope_len or len(tokens)))
        return np.asarray(rows)[: len(tokens)]

    def greedy(self, tokens: Sequence[int] | np.ndarray, num_tokens: int) -> list[int]:
        """The `num_tokens` most likely next tokens, one forward pass each."""
        out = list(np.asarray(tokens))
        for _ in range(num_tokens):
            out.append(int(self.logprobs(out)[-1].argmax()))
        return out[len(tokens) :]
