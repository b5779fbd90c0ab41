"""`config.json` of a Hugging Face checkpoint -> ModelConfig.

What it is: reading and refusing. Every refusal is a CheckpointError that names the file and the field.
What it is not: weights (`checkpoint.py`) or the tokenizer (`serving/tokenizer.py`).
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from loong_jax.config import ROPE_KINDS, ConfigError, ModelConfig, RopeConfig
from loong_jax.model.families import FAMILIES, Bias, Family, Windowed
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
    for field, values in family.only.items():
        if raw.get(field, values[0]) not in values:
            raise CheckpointError(f"{path}: {field}: {shown(raw[field])} is not supported, only {values[0]!r}")
    fields = _Fields(path, family.defaults | raw)
    num_heads = fields.positive("num_attention_heads")
    hidden_size = fields.positive("hidden_size")
    max_position = fields.positive("max_position_embeddings", 2048)
    biased = family.bias is Bias.CONFIG and fields.boolean("attention_bias", False)
    try:
        return ModelConfig(
            family=family.name,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.positive("num_key_value_heads", num_heads),
            head_dim=fields.positive("head_dim", hidden_size // num_heads),
            max_position=max_position,
            rope=_read_rope(fields, family, max_position),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_embeddings=fields.boolean("tie_word_embeddings", False),
            bos_id=_bos_id(path, raw),
            eos_ids=_eos_ids(path, raw),
            dtype=_read_dtype(path, raw),
            qkv_bias=biased or family.bias is Bias.QKV,
            o_bias=biased,
            windows=_read_windows(fields, family),
            window_rope=_read_window_rope(fields, family, max_position),
            query_scalar=fields.positive("query_pre_attn_scalar") if family.soft_caps else None,
            attn_soft_cap=fields.optional_number("attn_logit_softcapping") if family.soft_caps else None,
            logit_soft_cap=fields.optional_number("final_logit_softcapping") if family.soft_caps else None,
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

    def positive_number(self, field: str, default: float | None = None) -> float:
        value = self.number(field, default)
        if value <= 0:
            raise CheckpointError(f"{self.path}: {self.prefix}{field}: {value} is not positive")
        return value

    def optional_number(self, field: str) -> float | None:
        """A positive number, or None where it is absent or null."""
        return None if self.raw.get(field) is None else self.positive_number(field)

    def numbers(self, field: str) -> tuple[float, ...]:
        values = self._get(field, None, (list,))
        return tuple(_Fields(self.path, {field: value}, self.prefix).positive_number(field) for value in values)

    def object(self, *names: str) -> dict[str, Any]:
        """An object, or one within; empty where it is absent or null."""
        value: Any = self.raw
        for name in names:
            value = value.get(name) or {}
            if not isinstance(value, dict):
                raise CheckpointError(f"{self.path}: {self.prefix}{'.'.join(names)}: {shown(value)} is no object")
        return value

    def boolean(self, field: str, default: bool) -> bool:
        return self._get(field, default, (bool,))


def _read_windows(fields: _Fields, family: Family) -> tuple[int, ...]:
    """The window of each layer, 0 where it sees everything; () where no layer has one."""
    num_layers = fields.positive("num_hidden_layers")
    switched_off = family.windowed is Windowed.SWITCHED and not fields.boolean("use_sliding_window", False)
    size = None if switched_off or fields.raw.get("sliding_window") is None else fields.positive("sliding_window")
    match family.windowed:
        case Windowed.NEVER:
            return ()
        case Windowed.ALWAYS:
            windowed = [size is not None] * num_layers
        case _ if fields.raw.get("layer_types") is not None:
            windowed = _layer_types(fields, num_layers)
        case Windowed.SWITCHED:
            first = fields.integer("max_window_layers")
            windowed = [size is not None and layer >= first for layer in range(num_layers)]
        case Windowed.ALTERNATING:
            pattern = fields.positive("sliding_window_pattern")
            windowed = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if not any(windowed):
        return ()
    if size is None:
        raise CheckpointError(f"{fields.path}: sliding_window: is missing, but layers have a window")
    return tuple(size if has_window else 0 for has_window in windowed)


def _layer_types(fields: _Fields, num_layers: int) -> list[bool]:
    """Whether each layer has a window."""
    types = fields.raw["layer_types"]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in known for kind in types):
        raise CheckpointError(f"{fields.path}: layer_types: is no list of {num_layers} times one of {', '.join(known)}")
    return [kind == "sliding_attention" for kind in types]


def _read_rope(fields: _Fields, family: Family, max_position: int) -> RopeConfig:
    """`rope_parameters` (newer files) or `rope_theta` + `rope_scaling`, as `transformers` reads them."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.object(name)
    if "full_attention" in raw or "sliding_attention" in raw:
        if not family.window_rope:
            raise CheckpointError(f"{fields.path}: {name}.full_attention: only one rotary embedding is supported")
        raw, name = fields.object(name, "full_attention"), f"{name}.full_attention"
    return _rope_of(fields, raw, f"{name}.", fields.number("rope_theta", 10_000.0), max_position)


def _read_window_rope(fields: _Fields, family: Family, max_position: int) -> RopeConfig | None:
    """The rotary embedding of layers with a window, where the family gives them one."""
    if not family.window_rope or not any(_read_windows(fields, family)):
        return None
    raw = fields.object("rope_parameters", "sliding_attention")
    theta = fields.number("rope_local_base_freq")
    return _rope_of(fields, raw, "rope_parameters.sliding_attention.", theta, max_position)


def _rope_of(fields: _Fields, raw: dict[str, Any], prefix: str, theta: float, max_position: int) -> RopeConfig:
    """One object of rope parameters; `theta`: where it names none."""
    rope = _Fields(fields.path, raw, prefix)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPE_KINDS:
        known = ", ".join(ROPE_KINDS)
        raise CheckpointError(f"{fields.path}: {prefix}rope_type: {shown(kind)} is not supported, only {known}")
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{fields.path}: {holder.prefix}partial_rotary_factor: only 1.0 is supported")
    theta = rope.positive_number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta)
    if kind in ("linear", "dynamic"):
        config = RopeConfig(theta, kind, rope.positive_number("factor"))
        return config if kind == "linear" else msgspec.structs.replace(config, original_max_position=max_position)
    outside = fields.raw.get("original_max_position_embeddings") is not None
    original = (fields if outside else rope).positive("original_max_position_embeddings", max_position)
    # yarn and longrope may leave the factor to the two lengths.
    factor = rope.positive_number("factor", None if kind == "llama3" else max_position / original)
    config = RopeConfig(theta, kind, factor, original_max_position=original)
    return {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind](rope, config)


def _llama3(rope: _Fields, config: RopeConfig) -> RopeConfig:
    low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
    if high <= low:
        raise CheckpointError(f"{rope.path}: {rope.prefix}high_freq_factor: is not above low_freq_factor")
    return msgspec.structs.replace(config, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: _Fields, config: RopeConfig) -> RopeConfig:
    def stretched(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    scale, scale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    inferred = stretched(scale) / stretched(scale_all) if scale and scale_all else stretched(1.0)
    fast, slow = rope.positive_number("beta_fast", 32.0), rope.positive_number("beta_slow", 1.0)
    return msgspec.structs.replace(
        config,
        attention_factor=rope.positive_number("attention_factor", inferred),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.boolean("truncate", True),
    )


def _longrope(rope: _Fields, config: RopeConfig) -> RopeConfig:
    length = math.log(max(config.original_max_position, 2))
    inferred = 1.0 if config.factor <= 1 else math.sqrt(1 + math.log(config.factor) / length)
    return msgspec.structs.replace(
        config,
        attention_factor=rope.positive_number("attention_factor", inferred),
        short_factor=rope.numbers("short_factor"),
        long_factor=rope.numbers("long_factor"),
    )


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
