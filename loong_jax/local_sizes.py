"""What one rank of tensor parallelism holds of a model, in numbers, and how wide a head is in a pool.

What it is not: the parameters themselves (`model/decoder.py`), or bytes (`cost/memory.py`).
"""

from __future__ import annotations

import msgspec

from loong_jax.config import ConfigError, ModelConfig

_POOL_DIM_UNIT = {"tpu": 128, "gpu": 64}
"""What a pool's minor dimension is a multiple of. TPU tiles it by that, and a narrower pool would be copied whole; GPU
kernels swizzle shared memory over so many elements. As `pallas_kernels` says: chips.LANES, hopper.SWIZZLE_DIM."""


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


def pool_dim(config: ModelConfig, platform: str) -> int:
    """Values of a head in a pool on `platform` ("tpu", "gpu", or another, which pads nothing)."""
    unit = _POOL_DIM_UNIT.get(platform, 1)
    return -(-config.head_dim // unit) * unit
