"""The decoder of all families: modules, tensor parallelism, and the functions steps are composed from (DESIGN 5).

What it is: Flax NNX modules that define every weight, its shape on one tensor-parallel rank and its initialisation,
once; what a family does otherwise is a row of `families.py`, read here. They are split into plain pytrees (dicts) at
load; `decode_stack` and `logits` merge them back inside the trace, so a compiled step sees only arrays. Attention is an
argument: with `oracle.py`'s it is the numeric reference, with `loong_jax/esp` it is elastic.
What it is not: checkpoints (`checkpoint.py`), sampling (`sampling.py`), KV storage.

Tensor parallelism. A rank holds `num_heads / tp` query heads and their KV heads (replicated where tp exceeds
num_kv_heads), `intermediate_size / tp` columns of the SwiGLU, and a slice of the vocabulary padded to a multiple of tp.
`o` and `down` yield partial sums, added over `tp_axis` in float32. Few leaves a layer: the overhead of a call grows
with their number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from loong_jax.config import ModelConfig
from loong_jax.local_sizes import local_sizes
from loong_jax.model.families import family_of
from loong_jax.model.layers import gated, linear, rms_norm
from loong_jax.model.rope import Rotation, rotate, rotation

Params = dict[str, Any]
"""{"embed", "layers", "final_norm", "lm_head" (absent if tied)}; "layers" is a list of dicts or one stacked dict."""

Attend = Callable[[Any, Any, Array, Array, Array], tuple[Array, Any]]
"""attend(carry, layer, q[tok, head, dim], k[tok, kvh, dim], v[tok, kvh, dim]) -> (out[tok, head, dim], carry)."""


NO_WINDOW = 2**30
"""A window that no distance reaches: what a layer without one has where the layers differ."""


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig, fan_in: int) -> nnx.Param:
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(values.astype(config.dtype))


def _norm(config: ModelConfig, size: int) -> nnx.Param:
    """Weights of a norm that scales by one."""
    return nnx.Param(jnp.full((size,), 1.0 - family_of(config).norm_offset, config.dtype))


class Layer(nnx.Module):
    """One decoder layer on one tensor-parallel rank: pre-norm attention, pre-norm gated FFN."""

    def __init__(self, config: ModelConfig, tp: int, *, rngs: nnx.Rngs):
        local, family, d, dim = local_sizes(config, tp), family_of(config), config.hidden_size, config.head_dim
        self.config = config
        self.attn_norm = _norm(config, d)
        self.qkv = _weight(rngs, (d, local.heads_and_kv * dim), config, d)  # [q heads | k heads | v heads]
        self.o = _weight(rngs, (local.num_heads * dim, d), config, config.num_heads * dim)
        self.ffn_norm = _norm(config, d)
        self.gate_up = _weight(rngs, (d, 2 * local.intermediate_size), config, d)  # [gate | up]
        self.down = _weight(rngs, (local.intermediate_size, d), config, config.intermediate_size)
        if config.qkv_bias:
            self.qkv_bias = _weight(rngs, (local.heads_and_kv * dim,), config, d)
        if config.o_bias:
            self.o_bias = _weight(rngs, (d,), config, d)
        if family.qk_norm:
            self.q_norm, self.k_norm = _norm(config, dim), _norm(config, dim)
        if family.post_norms:
            self.attn_post_norm, self.ffn_post_norm = _norm(config, d), _norm(config, d)

    def _norm(self, x: Float[Array, "*rows d"], weight: nnx.Param) -> Float[Array, "*rows d"]:
        return rms_norm(x, weight[...], self.config.norm_eps, family_of(self.config).norm_offset)

    def project_qkv(
        self, x: Float[Array, "tok d"], by: Rotation
    ) -> tuple[Float[Array, "tok head dim"], Float[Array, "tok kvh dim"], Float[Array, "tok kvh dim"]]:
        """Queries, rotated keys and values of this rank's heads."""
        config = self.config
        num_heads = self.o.shape[0] // config.head_dim
        num_kv_heads = (self.qkv.shape[1] // config.head_dim - num_heads) // 2
        fused = linear(self._norm(x, self.attn_norm), self.qkv[...])
        if config.qkv_bias:
            fused = fused + self.qkv_bias[...].astype(fused.dtype)
        # Otherwise XLA for TPU merges the reshape into the product, which then wants the weights transposed: a step of
        # decode would copy those of all layers.
        fused = jax.lax.optimization_barrier(fused).reshape(x.shape[0], -1, config.head_dim)
        rotated, v = fused[:, : num_heads + num_kv_heads], fused[:, num_heads + num_kv_heads :]
        if family_of(config).qk_norm:
            q, k = self._norm(rotated[:, :num_heads], self.q_norm), self._norm(rotated[:, num_heads:], self.k_norm)
            rotated = jnp.concatenate([q, k], axis=1)
        rotated = rotate(rotated, by)
        q, k = rotated[:, :num_heads], rotated[:, num_heads:]
        return q.astype(config.dtype), k.astype(config.dtype), v.astype(config.dtype)

    def add_attention(
        self, x: Float[Array, "tok d"], out: Float[Array, "tok head dim"], tp_axis: str | None
    ) -> Float[Array, "tok d"]:
        out = _sum_over(linear(out.reshape(x.shape[0], -1), self.o[...]), tp_axis)
        if self.config.o_bias:  # whole on every rank: added once, to the sum
            out = out + self.o_bias[...].astype(out.dtype)
        if family_of(self.config).post_norms:
            out = self._norm(out, self.attn_post_norm)
        return x + out.astype(x.dtype)

    def add_ffn(self, x: Float[Array, "tok d"], tp_axis: str | None) -> Float[Array, "tok d"]:
        family = family_of(self.config)
        hidden = gated(linear(self._norm(x, self.ffn_norm), self.gate_up[...]), family.activation)
        out = _sum_over(linear(hidden, self.down[...]), tp_axis)
        if family.post_norms:
            out = self._norm(out, self.ffn_post_norm)
        return x + out.astype(x.dtype)


class Decoder(nnx.Module):
    """All weights on one tensor-parallel rank; random until loaded."""

    def __init__(self, config: ModelConfig, tp: int = 1, *, rngs: nnx.Rngs):
        vocab_size, d = local_sizes(config, tp).vocab_size, config.hidden_size
        self.embed = _weight(rngs, (vocab_size, d), config, d)
        self.layers = nnx.List([Layer(config, tp, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = _norm(config, d)
        if not config.tie_embeddings:
            self.lm_head = _weight(rngs, (vocab_size, d), config, d)


def _to_params(module: Decoder) -> Params:
    params = nnx.to_pure_dict(nnx.split(module)[1])
    params["layers"] = [params["layers"][layer] for layer in range(len(params["layers"]))]
    return params


def stack_layers(params: Params) -> Params:
    """The same parameters with the per-layer dicts stacked on a new first axis (the form for lax.scan)."""
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random parameters of the whole model (tp = 1, no tp axis), layers as a list."""
    return _to_params(Decoder(config, rngs=nnx.Rngs(seed)))


def param_structs(config: ModelConfig, tp: int, *, stacked: bool) -> Params:
    """Shapes of the parameters on all ranks: leaves `[tp, *local]`, or `[tp, layers, *local]` under "layers" if
    `stacked`. Raises ConfigError if `tp` cannot divide the model."""
    local = _to_params(nnx.eval_shape(lambda: Decoder(config, tp, rngs=nnx.Rngs(0))))
    if stacked:
        local = jax.eval_shape(stack_layers, local)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((tp, *leaf.shape), leaf.dtype), local)


def _sum_over(x: Array, tp_axis: str | None) -> Array:
    return x if tp_axis is None else jax.lax.psum(x, tp_axis)


def _embed(embed: Float[Array, "vocab d"], tokens: Int[Array, " tok"], tp_axis: str | None) -> Float[Array, "tok d"]:
    """Rows of the embedding; over ranks, each looks up what it holds (a sum of one row and zeros is exact)."""
    if tp_axis is None:
        return jnp.take(embed, tokens, axis=0, mode="clip")
    local = tokens - jax.lax.axis_index(tp_axis) * embed.shape[0]
    mine = (local >= 0) & (local < embed.shape[0])
    rows = jnp.take(embed, local, axis=0, mode="clip")
    return jax.lax.psum(jnp.where(mine[:, None], rows, jnp.zeros((), rows.dtype)), tp_axis)


def layer_window(config: ModelConfig, layer: int | Array) -> int | Array | None:
    """The window of a layer, as attention takes it: None where no layer has one, traced where `layer` is and layers
    differ."""
    windows = [window or NO_WINDOW for window in config.windows]
    if not config.windows or len(set(windows)) == 1:
        return windows[0] if windows else None
    return windows[layer] if isinstance(layer, int) else jnp.asarray(windows, jnp.int32)[layer]


def _rotations(config: ModelConfig, positions: Array, rope_len: Array | None) -> Callable[[int | Array], Rotation]:
    """Layer -> its rotation; each is computed once for all layers."""
    everywhere = rotation(config.rope, config.head_dim, positions, rope_len)
    if config.window_rope is None:
        return lambda layer: everywhere
    windowed = rotation(config.window_rope, config.head_dim, positions, rope_len)
    has_window = [window > 0 for window in config.windows]

    def of_layer(layer: int | Array) -> Rotation:
        if isinstance(layer, int):
            return windowed if has_window[layer] else everywhere
        here = jnp.asarray(has_window)[layer]
        return jax.tree.map(lambda a, b: jnp.where(here, a, b), windowed, everywhere)

    return of_layer


def decode_stack(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " tok"],
    positions: Int[Array, " tok"],
    attend: Attend,
    carry: Any,
    *,
    rope_len: Int[Array, " tok"] | None = None,
    tp_axis: str | None = None,
) -> tuple[Float[Array, "tok d"], Any]:
    """All layers. Leaves of `params` are local to one rank (no tp axis).

    `attend(carry, layer, q, k, v) -> (out, carry)` threads `carry` (e.g. the KV pool) through the layers; `layer` is an
    int when the layers are a list (unrolled), a traced int32 when they are stacked (lax.scan). k is rotated. Tokens
    and positions of padding may be anything; so is the hidden state of padding. `rope_len`: see `rope_frequencies`;
    only read if `config.rope_by_length`.
    Returns the hidden states before the final norm, and the last carry.
    """
    definition = nnx.graphdef(nnx.eval_shape(lambda: Layer(config, 1, rngs=nnx.Rngs(0))))
    rotation_of = _rotations(config, positions, rope_len)

    def apply(layer_params, x, carry, layer):
        module = nnx.merge(definition, layer_params)
        q, k, v = module.project_qkv(x, rotation_of(layer))
        out, carry = attend(carry, layer, q, k, v)
        return module.add_ffn(module.add_attention(x, out, tp_axis), tp_axis), carry

    x = _embed(params["embed"], tokens, tp_axis)
    if family_of(config).scaled_embedding:
        x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
    if isinstance(params["layers"], list):
        for layer, layer_params in enumerate(params["layers"]):
            x, carry = apply(layer_params, x, carry, layer)
        return x, carry

    def body(state, xs):
        x, carry = state
        layer, layer_params = xs
        return apply(layer_params, x, carry, layer), None

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x, carry), _ = jax.lax.scan(body, (x, carry), (layers, params["layers"]))
    return x, carry


def logits(
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "row d"],
    *,
    tp_axis: str | None = None,
) -> Float32[Array, "row vocab"]:
    """Final norm and output projection of hidden states from `decode_stack`; `[row, vocab_size]` on every rank."""
    head = params["embed"] if config.tie_embeddings else params["lm_head"]
    hidden = rms_norm(hidden, params["final_norm"], config.norm_eps, family_of(config).norm_offset)
    out = linear(hidden, head.T)
    if config.logit_soft_cap is not None:
        out = config.logit_soft_cap * jnp.tanh(out / config.logit_soft_cap)
    if tp_axis is not None:
        out = jax.lax.all_gather(out, tp_axis, axis=1, tiled=True)
    return out[:, : config.vocab_size]
