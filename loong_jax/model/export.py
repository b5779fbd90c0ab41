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

from loong_jax.config import ModelConfig, RopeConfig
from loong_jax.model.decoder import Params
from loong_jax.model.families import Bias, Windowed, family_of
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
            block = value[:, first : first + piece.shape[0]].T if leaf.transpose else value[first : first + size]
            out[piece.name] = np.ascontiguousarray(block)
            first += piece.shape[0]
    return out


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json from which `read_config` makes `config` again."""
    family = family_of(config)
    layer_types = ["sliding_attention" if window else "full_attention" for window in config.windows]
    out = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": config.dtype,
        **{field: values[0] for field, values in family.only.items() if values[0] is not None},
    }
    if family.bias is Bias.CONFIG:
        out["attention_bias"] = config.qkv_bias
    if family.windowed is not Windowed.NEVER:
        out["sliding_window"] = max(config.windows, default=0) or None
    if family.windowed in (Windowed.SWITCHED, Windowed.ALTERNATING):
        out["layer_types"] = layer_types or ["full_attention"] * config.num_layers
    if family.windowed is Windowed.SWITCHED:
        out["use_sliding_window"] = bool(config.windows)
    if family.soft_caps:
        out["query_pre_attn_scalar"] = config.query_scalar
        out["attn_logit_softcapping"] = config.attn_soft_cap
        out["final_logit_softcapping"] = config.logit_soft_cap
    if config.window_rope is not None:
        out["rope_local_base_freq"] = config.window_rope.theta
    return out


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    original = {"original_max_position_embeddings": rope.original_max_position}
    match rope.kind:
        case "default":
            return None
        case "linear" | "dynamic":
            named = {}
        case "llama3":
            named = {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor, **original}
        case "yarn":
            betas = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
            named = {"attention_factor": rope.attention_factor, **betas, **original}
        case _:
            factors = {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
            named = {"attention_factor": rope.attention_factor, **factors, **original}
    return {"rope_type": rope.kind, "factor": rope.factor, **named}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
