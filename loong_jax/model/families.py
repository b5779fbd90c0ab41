"""What differs between model families: one table row each.

What it is: the names a family's checkpoint gives to our weights, and the config fields it must not use.
What it is not: computation (`decoder.py`); a family that computes otherwise gets its own module and a row here.
"""

import msgspec


class Family(msgspec.Struct, frozen=True):
    """`architecture`: as in config.json. `refused`: field -> the only value we can serve (absent means that value).
    The names are those of checkpoint tensors; "{layer}" stands for the layer's index."""

    name: str
    architecture: str
    refused: dict[str, object]
    embed: str
    final_norm: str
    lm_head: str
    attn_norm: str
    q: str
    k: str
    v: str
    o: str
    ffn_norm: str
    gate: str
    up: str
    down: str


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    refused={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None},
    embed="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
    attn_norm="model.layers.{layer}.input_layernorm.weight",
    q="model.layers.{layer}.self_attn.q_proj.weight",
    k="model.layers.{layer}.self_attn.k_proj.weight",
    v="model.layers.{layer}.self_attn.v_proj.weight",
    o="model.layers.{layer}.self_attn.o_proj.weight",
    ffn_norm="model.layers.{layer}.post_attention_layernorm.weight",
    gate="model.layers.{layer}.mlp.gate_proj.weight",
    up="model.layers.{layer}.mlp.up_proj.weight",
    down="model.layers.{layer}.mlp.down_proj.weight",
)

FAMILIES = (LLAMA,)
