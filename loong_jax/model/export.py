"""Parameters -> a Hugging Face checkpoint directory: the inverse of `checkpoint.py`.

What it is: for models the project makes itself (fixtures, the default model). Weights are written in the checkpoint's
own layout, so the loader is tested on what it will meet.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import Params
from loong_jax.model.leaves import leaves_of
from loong_jax.model.safetensors_reader import INDEX_FILE, SINGLE_FILE


def save_checkpoint(directory: str | Path, config: ModelConfig, params: Params, *, num_files: int = 1) -> None:
    """Write config.json, generation_config.json and the weights (tp = 1, layers as a list) in `num_files` files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", hf_config(config))
    _write_json(directory / "generation_config.json", {"eos_token_id": list(config.eos_ids)})
    tensors = hf_tensors(config, params)
    if num_files == 1:
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
        return
    names = sorted(tensors)
    file_of = {
        n: f"model-{i * num_files // len(names) + 1:05d}-of-{num_files:05d}.safetensors" for i, n in enumerate(names)
    }
    for file in sorted(set(file_of.values())):
        part = {name: tensors[name] for name in names if file_of[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": file_of})


def hf_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Tensors by checkpoint name."""
    out: dict[str, np.ndarray] = {}
    for leaf in leaves_of(config, 1, 0):
        value: Any = params
        for key in leaf.path:
            value = value[key]
        value = np.asarray(value, jnp.dtype(config.dtype))
        first = 0
        for piece in leaf.pieces:
            size = piece.stop - piece.start
            block = value[:, first : first + piece.shape[0]].T if leaf.transpose else value[:size]
            out[piece.name] = np.ascontiguousarray(block)
            first += piece.shape[0]
    return out


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Llama."""
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": config.dtype,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
