"""config.json: what is read, and what is refused with its file and field named."""

import json

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
        ("attention_bias", {"attention_bias": True}),
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
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
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
