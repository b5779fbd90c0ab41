"""`config.json` of a Hugging Face checkpoint -> ModelConfig.

What it is: reading and refusing. Every refusal is a CheckpointError that names the file and the field.
What it is not: weights (`checkpoint.py`) or the tokenizer (`serving/tokenizer.py`).
"""

import math
from pathlib import Path
from typing import Any

from loong_jax.config import ConfigError, ModelConfig, RopeConfig
from loong_jax.model.families import FAMILIES, Family
from loong_jax.model.untrusted import CheckpointError, is_there, read_object, shown

# Far above any model, and low enough that no arithmetic or loop over a size gets out of hand.
_MOST = {
    "num_hidden_layers": 4096,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
}


def read_config(directory: str | Path) -> ModelConfig:
    """The model's configuration. Stop ids come from config.json and generation_config.json, united.

    Raises CheckpointError for a missing or broken file, an unsupported architecture, field or value.
    """
    path = Path(directory) / "config.json"
    raw = read_object(path.parent, path.name)
    family = family_of(raw.get("architectures"), path)
    for field, only in family.refused.items():
        if raw.get(field, only) != only:
            raise CheckpointError(f"{path}: {field}: {shown(raw[field])} is not supported, only {only!r}")
    fields = _Fields(path, raw)
    num_heads = fields.positive("num_attention_heads")
    hidden_size = fields.positive("hidden_size")
    head_dim = fields.positive("head_dim", hidden_size // num_heads)
    try:
        return ModelConfig(
            family=family.name,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.positive("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_position=fields.positive("max_position_embeddings", 2048),
            rope=_read_rope(fields),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_embeddings=fields.boolean("tie_word_embeddings", False),
            bos_id=_bos_id(path, raw),
            eos_ids=_eos_ids(path, raw),
            dtype=_read_dtype(path, raw),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def family_of(architectures: Any, path: Path) -> Family:
    """The family of config.json's `architectures`."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if family.architecture == name:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(f"{path}: architectures: {shown(architectures)} is not supported; supported: {known}")


class _Fields:
    """Typed access to a JSON object; a wrong or missing value is a CheckpointError naming the field."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str = ""):
        self.path, self.raw, self.prefix = path, raw, prefix

    def _get(self, field: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.raw.get(field)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: {shown(value)} is no {kinds[0].__name__}")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        return self._get(field, default, (int,))

    def positive(self, field: str, default: int | None = None) -> int:
        value = self.integer(field, default)
        if value < 1:
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: {shown(value)} is not positive")
        most = _MOST.get(field, 2**31 - 1)
        if value > most:
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: {shown(value)} is more than {most}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._get(field, default, (float, int))
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: is not finite")
        return value

    def boolean(self, field: str, default: bool) -> bool:
        return self._get(field, default, (bool,))


def _read_rope(fields: _Fields) -> RopeConfig:
    """`rope_parameters` (newer files) or `rope_theta` + `rope_scaling`; kinds "default" and "llama3"."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.raw.get(name) or {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{fields.path}: {name}: {shown(raw)} is no object")
    rope = _Fields(fields.path, raw, f"{name}.")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if theta <= 0:
        raise CheckpointError(f"{fields.path}: rope_theta: {theta} is not positive")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise CheckpointError(
            f"{fields.path}: {name}.rope_type: {shown(kind)} is not supported, only default and llama3"
        )
    config = RopeConfig(
        theta=theta,
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.positive("original_max_position_embeddings"),
    )
    if config.factor <= 0:
        raise CheckpointError(f"{fields.path}: {name}.factor: {config.factor} is not positive")
    if config.high_freq_factor <= config.low_freq_factor:
        raise CheckpointError(f"{fields.path}: {name}.high_freq_factor: is not above low_freq_factor")
    return config


def _read_dtype(path: Path, raw: dict[str, Any]) -> str:
    """Weights of float16 are refused: their range is not bfloat16's, and silence would change results."""
    dtype = raw.get("dtype", raw.get("torch_dtype")) or "float32"
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"{path}: dtype: {shown(dtype)} is not supported, only float32 and bfloat16")
    return dtype


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _bos_id(path: Path, raw: dict[str, Any]) -> int | None:
    value = raw.get("bos_token_id")
    if value is not None and not _is_token(value):
        raise CheckpointError(f"{path}: bos_token_id: {shown(value)} is no token id")
    return value


def _eos_ids(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    sources = [(path, raw)]
    if is_there(path.parent, "generation_config.json"):
        sources.append((path.parent / "generation_config.json", read_object(path.parent, "generation_config.json")))
    found: list[int] = []
    for source, values in sources:
        ids = values.get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(_is_token(token) for token in ids):
            raise CheckpointError(f"{source}: eos_token_id: {shown(ids)} are no token ids")
        found += [token for token in ids if token not in found]
    return tuple(found)
