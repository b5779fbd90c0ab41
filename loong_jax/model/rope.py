"""Rotary embedding: frequencies of every kind, and the rotation.

What it is: pure functions. A kind is a way to make frequencies from the plain ones; the rotation is the same for all.
Where frequencies depend on a request's length they do so through `rope_len` alone, which is fixed for its life: cached
keys depend neither on chunks nor on how far decoding has come. What it is not: reading of a configuration
(`hf_config.py`).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from loong_jax.config import RopeConfig


class Rotation(NamedTuple):
    """Of each token and rotated pair of lanes."""

    cos: Float32[Array, "tok half"]
    sin: Float32[Array, "tok half"]


def rope_frequencies(
    rope: RopeConfig, head_dim: int, rope_len: Int[Array, " tok"] | None = None
) -> Float32[np.ndarray, " half"] | Float32[Array, "tok half"]:
    """Radians a position of each of the `head_dim / 2` rotated pairs; of each token if `rope.by_length`, which needs
    `rope_len`: the number of tokens its request was admitted with.

    float32 arithmetic on purpose: a rounding other than the reference implementation's is multiplied by the position.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.power(np.float32(rope.theta), exponent)
    match rope.kind:
        case "default":
            return np.float32(1.0) / base
        case "linear":
            return (np.float32(1.0) / base) / np.float32(rope.factor)
        case "llama3":
            return _llama3(rope, np.float32(1.0) / base)
        case "yarn":
            return _yarn(rope, base, head_dim)
    assert rope_len is not None, rope.kind
    length = rope_len[:, None]
    if rope.kind == "longrope":
        short, long = (1.0 / (np.array(f, np.float32) * base) for f in (rope.short_factor, rope.long_factor))
        return jnp.where(length > rope.original_max_position, long, short)
    assert rope.kind == "dynamic", rope.kind
    # theta grows with the length; as a factor of the plain frequencies, which is exactly 1 up to the original length.
    stretch = jnp.maximum(length / rope.original_max_position, 1.0)
    growth = rope.factor * stretch - (rope.factor - 1.0)
    return jnp.float32(1.0) / base * growth ** (-exponent * np.float32(head_dim / (head_dim - 2)))


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """High frequencies stay, low ones are divided by `factor`, linear in between."""
    turns = rope.original_max_position / (2 * np.pi / frequencies)
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> np.ndarray:
    """Lanes that turn more than `beta_fast` times within the original length stay, those below `beta_slow` are divided
    by `factor`, linear in the lane in between."""

    def lane(num_turns: float) -> float:
        turned = math.log(rope.original_max_position / (num_turns * 2 * math.pi))
        return head_dim * turned / (2 * math.log(rope.theta))

    low, high = lane(rope.beta_fast), lane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    divided = np.float32(1.0) / (np.float32(rope.factor) * base)
    return (divided * ramp + (np.float32(1.0) / base) * (1 - ramp)).astype(np.float32)


def rotation(
    rope: RopeConfig, head_dim: int, positions: Int[Array, " tok"], rope_len: Int[Array, " tok"] | None = None
) -> Rotation:
    """`rope_len` as in `rope_frequencies`."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(rope, head_dim, rope_len)
    return Rotation(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def rotate(x: Float[Array, "tok head dim"], by: Rotation) -> Float32[Array, "tok head dim"]:
    """ "Half" layout: the pair of lane i is lane i + dim / 2."""
    cos, sin = by.cos[:, None, :], by.sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
