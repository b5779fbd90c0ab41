"""config.json: what is read, and what is refused with its file and field named."""

import json
import math

import pytest

from loong_jax.config import RopeConfig
from loong_jax.model.hf_config import CheckpointError, read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
WINDOWED = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7, "head_dim": 16}


def read(tmp_path, generation=None, **changes):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (LLAMA | changes).items() if v != "absent"}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_config(tmp_path)


def test_defaults_of_a_short_file(tmp_path):
    config = read(tmp_path)
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 4, 16)
    assert (config.rope, config.eos_ids, config.bos_id) == (RopeConfig(10_000.0), (2,), None)
    assert (config.dtype, config.tie_embeddings) == ("bfloat16", False)


def test_explicit_fields(tmp_path):
    config = read(tmp_path, head_dim=32, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=7)
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings, config.bos_id) == (32, 2, True, 7)


def test_stop_ids_are_united(tmp_path):
    assert read(tmp_path, {"eos_token_id": [5, 2]}, eos_token_id=[2, 3]).eos_ids == (2, 3, 5)
    assert read(tmp_path, {}, eos_token_id=None).eos_ids == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},  # newer files
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    ],
)
def test_both_spellings_of_rope(tmp_path, fields):
    assert read(tmp_path, **fields).rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


def test_default_rope_in_the_newer_spelling(tmp_path):
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope == RopeConfig(1e6)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("architectures", {"architectures": ["MambaForCausalLM"]}),
        ("architectures", {"architectures": "absent"}),
        ("attention_bias", {"attention_bias": "yes"}),
        ("mlp_bias", {"mlp_bias": True}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("hidden_size", {"hidden_size": "absent"}),
        ("hidden_size", {"hidden_size": "64"}),
        ("num_hidden_layers", {"num_hidden_layers": 0}),
        ("num_hidden_layers", {"num_hidden_layers": True}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("num_kv_heads", {"num_key_value_heads": 3}),
        ("num_key_value_heads", {"num_key_value_heads": 0}),
        ("head_dim", {"head_dim": 15}),
        ("head_dim", {"head_dim": 0}),
        ("dtype", {"torch_dtype": "float16"}),
        ("dtype", {"dtype": "int8"}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}),
        ("rope_scaling.factor", {"rope_scaling": {"rope_type": "linear"}}),
        ("rope_scaling.factor", {"rope_scaling": {"rope_type": "dynamic", "factor": -1}}),
        ("rope_scaling.attention_factor", {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 0}}),
        ("rope_scaling.truncate", {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 0}}),
        ("rope_scaling.short_factor", {"rope_scaling": {"type": "longrope", "factor": 2}}),
        ("rope_scaling.long_factor", {"rope_scaling": LONGROPE | {"long_factor": [1, "2"]}}),
        ("rope factors", {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_scaling.partial_rotary_factor", {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}),
        ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {}}}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "llama3"}}),
        ("rope_scaling.factor", {"rope_scaling": LLAMA3 | {"factor": 0.0}}),
        ("rope_scaling.high_freq_factor", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
        ("rope_scaling", {"rope_scaling": "llama3"}),
        ("rope_theta", {"rope_theta": "big"}),
        ("rope_theta", {"rope_theta": -1}),
        ("rope_theta", {"rope_theta": 10**400}),
        ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
        ("rms_norm_eps", {"rms_norm_eps": [1e-5]}),
        ("num_hidden_layers", {"num_hidden_layers": 10**9}),
        ("vocab_size", {"vocab_size": 10**30}),
        ("vocab_size", {"vocab_size": 1e3}),
        ("vocab_size", {"vocab_size": -5}),
        ("hidden_size", {"hidden_size": {"a": [1]}}),
        ("max_position_embeddings", {"max_position_embeddings": 2**31}),
        ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
        ("dtype", {"torch_dtype": ["float32"]}),
        ("architectures", {"architectures": {"0": "LlamaForCausalLM"}}),
        ("architectures", {"architectures": [["LlamaForCausalLM"]]}),
        ("bos_token_id", {"bos_token_id": -1}),
        ("bos_token_id", {"bos_token_id": [1]}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
        ("eos_token_id", {"eos_token_id": [True]}),
        ("eos_token_id", {"eos_token_id": [-1]}),
        ("eos_token_id", {"eos_token_id": 2**40}),
    ],
)
def test_refusals_name_file_and_field(tmp_path, field, changes):
    with pytest.raises(CheckpointError, match=field) as refusal:
        read(tmp_path, **changes)
    assert "config.json" in str(refusal.value)


def rope(tmp_path, scaling, **changes):
    return read(tmp_path, rope_scaling=scaling, **changes).rope


def test_rope_kinds(tmp_path):
    assert rope(tmp_path, {"type": "linear", "factor": 2}) == RopeConfig(1e4, "linear", 2.0)
    dynamic = rope(tmp_path, {"type": "dynamic", "factor": 2}, max_position_embeddings=64)
    assert dynamic == RopeConfig(1e4, "dynamic", 2.0, original_max_position=64)
    yarn = rope(tmp_path, {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32})
    assert yarn == RopeConfig(1e4, "yarn", 4.0, original_max_position=32, attention_factor=0.1 * math.log(4) + 1)
    longrope = rope(tmp_path, LONGROPE, original_max_position_embeddings=32, max_position_embeddings=128)
    stretch = math.sqrt(1 + math.log(4) / math.log(32))
    assert (longrope.factor, longrope.original_max_position, longrope.attention_factor) == (4.0, 32, stretch)


def test_yarn_attention_factor_is_given_or_inferred(tmp_path):
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32}
    assert rope(tmp_path, yarn | {"attention_factor": 0.5}).attention_factor == 0.5
    both = rope(tmp_path, yarn | {"mscale": 0.707, "mscale_all_dim": 1.0}).attention_factor
    assert both == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))
    no_factor = {"type": "yarn", "original_max_position_embeddings": 32}
    assert rope(tmp_path, no_factor, max_position_embeddings=96).factor == 3.0


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, ()),  # transformers does not read it either
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}, (4096, 4096)),
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": None}, ()),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 0}, ()),
        (WINDOWED, ()),  # max_window_layers is 28
        (WINDOWED | {"max_window_layers": 1}, (0, 8)),
        (WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}, (8, 0)),
        ({"architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "sliding_window": 8}, (8, 0)),
        (GEMMA3, (4096,) * 5 + (0, 4096)),
        (GEMMA3 | {"sliding_window_pattern": 3, "sliding_window": 8}, (8, 8, 0, 8, 8, 0, 8)),
    ],
)
def test_windows(tmp_path, changes, windows):
    assert read(tmp_path, **changes).windows == windows


def test_biases(tmp_path):
    biases = lambda **changes: (lambda config: (config.qkv_bias, config.o_bias))(read(tmp_path, **changes))
    assert biases() == (False, False)
    assert biases(attention_bias=True) == (True, True)
    assert biases(architectures=["Qwen2ForCausalLM"], attention_bias=False) == (True, False)
    assert biases(architectures=["MistralForCausalLM"], num_key_value_heads=2, attention_bias=True) == (False, False)


def test_gemma_fields(tmp_path):
    config = read(tmp_path, **GEMMA3)
    assert (config.rope, config.window_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert (config.query_scalar, config.attn_soft_cap, config.logit_soft_cap) == (256, None, None)
    assert config.tie_embeddings
    assert config.attention_scale == 1 / 16
    new = {"sliding_attention": {"rope_theta": 5.0}, "full_attention": {"rope_type": "linear", "factor": 8.0}}
    config = read(tmp_path, **GEMMA3, rope_parameters=new)
    assert (config.rope, config.window_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(5.0))
    config = read(tmp_path, architectures=["Gemma2ForCausalLM"], query_pre_attn_scalar=24)
    assert (config.head_dim, config.attn_soft_cap, config.logit_soft_cap) == (256, 50.0, 30.0)
    assert (config.query_scalar, config.rope, config.window_rope) == (24, RopeConfig(1e4), None)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("layer_types", WINDOWED | {"layer_types": ["sliding_attention"]}),
        ("layer_types", WINDOWED | {"layer_types": ["sliding_attention", "chunked_attention"]}),
        ("layer_types", {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 2}),
        ("sliding_window", WINDOWED | {"sliding_window": 0}),
        ("sliding_window", WINDOWED | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}),
        ("use_sliding_window", WINDOWED | {"use_sliding_window": 1}),
        ("hidden_activation", GEMMA3 | {"hidden_activation": "gelu"}),
        ("use_bidirectional_attention", GEMMA3 | {"use_bidirectional_attention": True}),
        ("attn_logit_softcapping", GEMMA3 | {"attn_logit_softcapping": 0}),
        ("query_pre_attn_scalar", GEMMA3 | {"query_pre_attn_scalar": "big"}),
        ("rope_parameters.sliding_attention", GEMMA3 | {"rope_parameters": {"sliding_attention": 3}}),
    ],
)
def test_refusals_of_other_families(tmp_path, field, changes):
    with pytest.raises(CheckpointError, match=field):
        read(tmp_path, **changes)


def test_context_length_is_stretched_where_max_position_is_the_original(tmp_path):
    length = lambda scaling, **changes: (
        read(tmp_path, rope_scaling=scaling, max_position_embeddings=100, **changes).context_length
    )
    assert length(None) == 100
    assert length({"type": "dynamic", "factor": 4}) == length({"type": "linear", "factor": 4}) == 400
    yarn = {"type": "yarn", "factor": 4}
    assert length(yarn) == 400
    assert length(yarn | {"original_max_position_embeddings": 25}) == 100
    assert length({"type": "linear", "factor": 8}, **GEMMA3) == 100


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: file is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "\xff", '{"a": ' * 100_000, '{"vocab_size": NaN}', '{"a": ' + "9" * 5000 + "}"]
)
def test_broken_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: is no JSON") as refusal:
        read_config(tmp_path)
    assert len(str(refusal.value)) < 500


def test_a_field_given_twice(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 5, "vocab_size": 6}')
    with pytest.raises(CheckpointError, match=r"config\.json: 'vocab_size': is there twice"):
        read_config(tmp_path)


def test_infinite_numbers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA).replace("1e-05", "1e999"))
    with pytest.raises(CheckpointError, match=r"config\.json: rms_norm_eps: is not finite"):
        read_config(tmp_path)
