"""Models to compile, by name or by their config.json.

What it is: shapes only; no weight is read. What it is not: the reader of config.json (`loong_jax/model/hf_config.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from loong_jax.config import ModelConfig
from loong_jax.cost.presets import MODELS
from loong_jax.model.hf_config import read_config

QWEN3_32B = ModelConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=5120,
    intermediate_size=25_600,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position=1 << 20,
    dtype="bfloat16",
)

SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-2-7b": MODELS["lwm-7b"],
        "llama-3-8b": MODELS["llama-3.1-8b"],
        "llama-3-70b": MODELS["llama-3.1-70b"],
        "qwen3-32b": QWEN3_32B,
    }
)


def model_named(name: str) -> ModelConfig:
    """A shape of `SHAPES`, or that of a checkpoint's folder or config.json. Raises ValueError naming the field, and
    CheckpointError for a config.json that is refused."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    folder = path.parent if path.name == "config.json" else path
    if (folder / "config.json").is_file():
        return read_config(folder)
    raise ValueError(f"model: {name!r} is neither a folder with a config.json nor one of {', '.join(SHAPES)}")
