"""The model as training sees it: a Llama decoder on short sequences with a bias on attention, and its checkpoint files.

What it is not: serving (`loong_jax.model`), which loads what `save` writes as any Hugging Face checkpoint.
"""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from needle.tokens import BOS, BOS_ID, EOS, EOS_ID, VOCAB_SIZE
from safetensors.numpy import save_file

Params = dict[str, Array]
"""`embed` [vocab, hidden], `norm` [hidden]; the others with a leading axis of layers, matrices as [in, out]."""

_RMS_EPS = 1e-5
_MASKED = -1e9
_HF_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class Shape(msgspec.Struct, frozen=True):
    """Few layers, because all of them attend to everything. The large `rope_theta` leaves most pairs of a head nearly
    unrotated up to `max_position`: those find a key wherever it is, the fast ones find neighbours."""

    hidden: int = 160
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 320
    vocab: int = VOCAB_SIZE
    rope_theta: float = 1e12
    max_position: int = 131_072


def init(shape: Shape, seed: int) -> Params:
    d, depth = shape.hidden, shape.layers
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def matrix(fan_in: int, fan_out: int, scale: float = 1.0) -> Array:
        return jax.random.normal(next(keys), (depth, fan_in, fan_out)) * (scale * fan_in**-0.5)

    residual = 1 / math.sqrt(2 * depth)
    return {
        "embed": jax.random.normal(next(keys), (shape.vocab, d)) * 0.08,
        "norm": jnp.ones(d),
        "attention_norm": jnp.ones((depth, d)),
        "mlp_norm": jnp.ones((depth, d)),
        "q": matrix(d, q),
        "k": matrix(d, kv),
        "v": matrix(d, kv),
        "o": matrix(q, d, residual),
        "gate": matrix(d, shape.mlp),
        "up": matrix(d, shape.mlp),
        "down": matrix(shape.mlp, d, residual),
    }


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, " d"]) -> Float[Array, "... d"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + _RMS_EPS) * weight


def rotate(x: Float[Array, "... tok head dim"], positions: Int[Array, "... tok"], theta: float) -> Array:
    """Rotary positions in the half-split form of Hugging Face."""
    half = x.shape[-1] // 2
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def qkv(shape: Shape, params: Params, layer: int, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries [..., tok, kv_head, group, dim], keys and values [..., tok, kv_head, dim], rotated."""
    h = rms_norm(x, params["attention_norm"][layer])
    split = lambda y, heads: y.reshape(*y.shape[:-1], heads, shape.head_dim)
    q = rotate(split(h @ params["q"][layer], shape.heads), positions, shape.rope_theta)
    k = rotate(split(h @ params["k"][layer], shape.kv_heads), positions, shape.rope_theta)
    v = split(h @ params["v"][layer], shape.kv_heads)
    return q.reshape(*q.shape[:-2], shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim), k, v


def after_attention(params: Params, layer: int, x: Array, attended: Array) -> Array:
    x = x + attended.reshape(*x.shape[:-1], -1) @ params["o"][layer]
    h = rms_norm(x, params["mlp_norm"][layer])
    return x + (jax.nn.silu(h @ params["gate"][layer]) * (h @ params["up"][layer])) @ params["down"][layer]


def logits(params: Params, x: Array) -> Array:
    return rms_norm(x, params["norm"]) @ params["embed"].T


def forward(
    shape: Shape,
    params: Params,
    ids: Int[Array, "b tok"],
    positions: Int[Array, "b tok"],
    bias: Float[Array, "b tok tok"],
) -> Float[Array, "b tok vocab"]:
    """Logits under causal attention; `bias` is added to the attention logits of [query, key]."""
    tokens = jnp.arange(ids.shape[1])
    mask = jnp.where(tokens[:, None] >= tokens, bias, _MASKED)[:, None, None]
    x = params["embed"][ids]
    for layer in range(shape.layers):
        q, k, v = qkv(shape, params, layer, x, positions)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * shape.head_dim**-0.5 + mask
        x = after_attention(params, layer, x, jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, -1), v))
    return logits(params, x)


def save(folder: Path, shape: Shape, params: Params, tokenizer: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files as `transformers` loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value, np.float32) for name, value in params.items()}
    tensors = {"model.embed_tokens.weight": arrays["embed"], "model.norm.weight": arrays["norm"]}
    for name, hf_name in _HF_NAMES.items():
        for layer in range(shape.layers):
            tensor = np.ascontiguousarray(arrays[name][layer].T)
            tensors[f"model.layers.{layer}.{hf_name}.weight"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": _RMS_EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_position,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
