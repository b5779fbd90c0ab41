"""What export writes is what the loader reads, and what `transformers` names."""

import json

import jax
import msgspec
import numpy as np
import pytest

from loong_jax.config import ModelConfig, RopeConfig
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import read_config

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 32, 4096, bos_id=0, eos_ids=(1, 2))
ROPE3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 1024)


GEMMA3 = {
    "family": "gemma3_text",
    "windows": (64, 0),
    "window_rope": RopeConfig(1e3),
    "query_scalar": 24,
    "o_bias": True,
    "qkv_bias": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"rope": ROPE3},
        {"dtype": "bfloat16", "qkv_bias": True, "o_bias": True},
        {"family": "mistral", "windows": (32, 32), "rope": RopeConfig(1e4, "linear", 2.0)},
        {"family": "mistral"},
        {"family": "qwen2", "qkv_bias": True, "rope": RopeConfig(1e6, "yarn", 4.0, original_max_position=1024)},
        {"family": "qwen2", "qkv_bias": True, "windows": (0, 32)},
        {"family": "qwen3", "rope": RopeConfig(1e6, "dynamic", 4.0, original_max_position=4096)},
        {"rope": RopeConfig(1e6, "longrope", 4.0, short_factor=(1.0,) * 16, long_factor=(2.0,) * 16)},
        {"family": "gemma2", "attn_soft_cap": 50.0, "logit_soft_cap": 30.0, "query_scalar": 16, "windows": (8, 0)},
        GEMMA3,
    ],
    ids=str,
)
def test_export_and_load_are_inverse(tmp_path, changes):
    config = msgspec.structs.replace(CONFIG, **changes)
    params = init_params(config, 0)
    save_checkpoint(tmp_path, config, params)
    assert read_config(tmp_path) == config
    loaded = load_checkpoint(tmp_path, config, tp=1, devices=[jax.devices()[:1]], stacked=False)[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), loaded, params)


def test_sharded_index_covers_every_tensor(tmp_path):
    save_checkpoint(tmp_path, CONFIG, init_params(CONFIG, 0), num_files=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 3 + 9 * CONFIG.num_layers
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
