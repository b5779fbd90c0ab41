"""The shipped model: a whole Hugging Face checkpoint of few bytes, with a card that tells what was measured."""

import json
import re

from safetensors import safe_open
from tokenizers import Tokenizer

from loong_jax.default_model import DEFAULT_MODEL
from loong_jax.model.hf_config import read_config

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
MAX_BYTES = 16 * 2**20


def test_the_files_are_there_and_small():
    found = {path.name: path.stat().st_size for path in DEFAULT_MODEL.iterdir() if path.is_file()}
    assert set(found) - {"__init__.py"} == FILES
    assert sum(found.values()) <= MAX_BYTES


def test_it_loads_by_the_names_of_transformers():
    config = read_config(DEFAULT_MODEL)
    told = json.loads((DEFAULT_MODEL / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"]
    assert config.family == "llama"
    assert config.num_layers <= 4
    assert config.max_position >= 131_072
    with safe_open(DEFAULT_MODEL / "model.safetensors", "numpy") as tensors:
        names = set(tensors.keys())
    layer = {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    layers = {f"model.layers.{i}.{name}" for i in range(config.num_layers) for name in layer}
    assert names == {"model.embed_tokens.weight", "model.norm.weight"} | layers


def test_the_tokenizer_is_the_models():
    config = read_config(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size
    text = "Elastic — 弹性 \n\t sequence"
    ids = tokenizer.encode(text).ids
    assert ids[0] == config.bos_id
    assert tokenizer.decode(ids) == text


def test_the_card_tells_data_time_scores_and_limits():
    card = (DEFAULT_MODEL / "README.md").read_text(encoding="utf-8")
    for heading in ("Data", "Training", "Scores", "Limits"):
        assert re.search(rf"^## {heading}", card, re.M), heading
    for length in ("4,096", "16,384", "32,768", "65,536", "131,072"):
        assert length in card
