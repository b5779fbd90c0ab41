"""Building blocks against definitions written another way."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.config import RopeConfig
from loong_jax.model.layers import linear, rms_norm, rope_frequencies, rotate, swiglu


def test_rms_norm_is_float32_inside():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) * 100
    weight = np.arange(1, 9, dtype=np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5), expected, rtol=1e-6)
    assert rms_norm(jnp.asarray(x), jnp.asarray(weight, jnp.bfloat16), 1e-5).dtype == jnp.bfloat16


def test_rotation_is_complex_multiplication():
    frequencies = rope_frequencies(RopeConfig(theta=100.0), 8)
    x = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 3])
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * frequencies)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), jnp.asarray(positions), frequencies), expected, atol=1e-5)


def test_llama3_frequencies_keep_fast_and_slow_down_slow_pairs():
    rope = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = rope_frequencies(RopeConfig(500_000.0), 128)
    scaled = rope_frequencies(rope, 128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_accumulates_in_float32(dtype):
    # A sum of many ones beyond what bfloat16 can count.
    out = linear(jnp.ones((1, 4096), dtype), jnp.ones((4096, 3), dtype))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 4096.0)
    out = linear(jnp.ones((1, 4097), dtype), jnp.ones((4097, 3), dtype))
    np.testing.assert_array_equal(out, 4097.0)


def test_swiglu():
    gate, up = np.array([[-1.0, 2.0]]), np.array([[3.0, 5.0]])
    out = swiglu(jnp.asarray(np.concatenate([gate, up], axis=1), jnp.float32))
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-6)
