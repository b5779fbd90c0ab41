"""What one rank of tensor parallelism holds of a model, in numbers.

What it is not: the parameters themselves (`model/decoder.py`), or bytes (`cost/memory.py`).
"""

from __future__ import annotations

import msgspec

from loong_jax.config import ConfigError, ModelConfig


class Local(msgspec.Struct, frozen=True):
    """Sizes on one tensor-parallel rank."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int  # of the padded vocabulary

    @property
    def heads_and_kv(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads


def local_sizes(config: ModelConfig, tp: int) -> Local:
    """What one of `tp` ranks holds. Raises ConfigError naming the field that cannot be divided."""
    for field in ("num_heads", "intermediate_size"):
        if getattr(config, field) % tp:
            raise ConfigError(f"{field}: {getattr(config, field)} cannot be divided over tp = {tp}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ConfigError(f"num_kv_heads: {config.num_kv_heads} neither divides tp = {tp} nor is divided by it")
    return Local(
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        intermediate_size=config.intermediate_size // tp,
        vocab_size=-(-config.vocab_size // tp),
    )
