"""What differs between model families: one table row each.

What it is: the switches by which a family computes otherwise than Llama, what its config.json means where it is silent,
what we refuse, and the names of its tensors. What it is not: computation (`decoder.py`), or what differs between
checkpoints of one family (`ModelConfig`).
"""

from enum import StrEnum
from typing import Any

import msgspec

from loong_jax.config import ModelConfig


class Bias(StrEnum):
    """Which attention projections have a bias."""

    NEVER = "never"
    QKV = "qkv"
    CONFIG = "config"  # all four, if `attention_bias` says so


class Windowed(StrEnum):
    """Which layers have a sliding window."""

    NEVER = "never"
    ALWAYS = "always"  # all, unless `sliding_window` is null
    SWITCHED = "switched"  # `use_sliding_window`: those of `layer_types`, or from `max_window_layers` on
    ALTERNATING = "alternating"  # those of `layer_types`, or all but every `sliding_window_pattern`-th


class Family(msgspec.Struct, frozen=True):
    """`name`: the `model_type` of config.json; `architecture`: of its `architectures`. `defaults`: its fields where
    they are absent; `only`: field -> the values we can serve, the first where it is absent. In names of tensors
    "{layer}" stands for the layer's index.

    `norm_offset`: is added to the weights of norms; `post_norms`: attention and FFN are normed again before they are
    added; `qk_norm`: queries and keys are normed by head; `scaled_embedding`: by the root of hidden_size."""

    name: str
    architecture: str
    defaults: dict[str, Any] = {}
    only: dict[str, tuple[Any, ...]] = {}
    bias: Bias = Bias.NEVER
    windowed: Windowed = Windowed.NEVER
    activation: str = "silu"
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    soft_caps: bool = False  # reads `attn_logit_softcapping`, `final_logit_softcapping` and `query_pre_attn_scalar`
    window_rope: bool = False  # layers with a window have a rotary embedding of their own

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    attn_norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.k_proj.weight"
    v: str = "model.layers.{layer}.self_attn.v_proj.weight"
    o: str = "model.layers.{layer}.self_attn.o_proj.weight"
    q_bias: str = "model.layers.{layer}.self_attn.q_proj.bias"
    k_bias: str = "model.layers.{layer}.self_attn.k_proj.bias"
    v_bias: str = "model.layers.{layer}.self_attn.v_proj.bias"
    o_bias: str = "model.layers.{layer}.self_attn.o_proj.bias"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    attn_post_norm: str = ""
    ffn_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    gate: str = "model.layers.{layer}.mlp.gate_proj.weight"
    up: str = "model.layers.{layer}.mlp.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.down_proj.weight"
    ffn_post_norm: str = ""


_SWITCHED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_UNQUANTIZED = {"quantization_config": (None,)}
_SILU = {"hidden_act": ("silu",), **_UNQUANTIZED}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    only={"mlp_bias": (False, None), **_SILU},
    bias=Bias.CONFIG,
)
MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    only={"layer_types": (None,), **_SILU},
    windowed=Windowed.ALWAYS,
)
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={"max_position_embeddings": 32_768, **_SWITCHED},
    only=_SILU,
    bias=Bias.QKV,
    windowed=Windowed.SWITCHED,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={"max_position_embeddings": 32_768, "head_dim": 128, **_SWITCHED},
    only=_SILU,
    bias=Bias.CONFIG,
    windowed=Windowed.SWITCHED,
    qk_norm=True,
)
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        **_GEMMA_DEFAULTS,
    },
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False, None),
        **_UNQUANTIZED,
    },
    bias=Bias.CONFIG,
    windowed=Windowed.ALTERNATING,
    activation="gelu_tanh",
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    soft_caps=True,
    attn_post_norm="model.layers.{layer}.post_attention_layernorm.weight",
    ffn_norm="model.layers.{layer}.pre_feedforward_layernorm.weight",
    ffn_post_norm="model.layers.{layer}.post_feedforward_layernorm.weight",
)
GEMMA3 = msgspec.structs.replace(
    GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        **_GEMMA_DEFAULTS,
    },
    qk_norm=True,
    window_rope=True,
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)


def family_of(config: ModelConfig) -> Family:
    """The row that `config.family` names."""
    return next(family for family in FAMILIES if family.name == config.family)
