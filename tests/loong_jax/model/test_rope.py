"""Rotary embedding against definitions written another way; `transformers` judges through the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.config import RopeConfig
from loong_jax.model.rope import rope_frequencies, rotate, rotation

LONG = RopeConfig(1e4, "longrope", original_max_position=64, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))


def test_rotation_is_complex_multiplication():
    rope = RopeConfig(theta=100.0, attention_factor=1.5)
    x = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 3])
    turns = np.exp(1j * positions[:, None, None] * rope_frequencies(rope, 8))
    pairs = (x[..., :4] + 1j * x[..., 4:]) * turns * 1.5
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation(rope, 8, jnp.asarray(positions))), expected, atol=1e-5)


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


def test_yarn_keeps_fast_and_divides_slow_pairs():
    plain = rope_frequencies(RopeConfig(1e6), 128)
    scaled = rope_frequencies(RopeConfig(1e6, "yarn", 4.0, original_max_position=32768), 128)
    turns = 32768 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert np.all(np.diff(plain / scaled) >= -1e-5)


def test_linear_divides():
    plain, scaled = rope_frequencies(RopeConfig(1e4), 16), rope_frequencies(RopeConfig(1e4, "linear", 8.0), 16)
    np.testing.assert_allclose(scaled * 8, plain, rtol=1e-6)


def test_longrope_chooses_by_the_length_of_each_request():
    out = rope_frequencies(LONG, 4, jnp.array([1, 64, 65]))
    plain = rope_frequencies(RopeConfig(1e4), 4)
    np.testing.assert_allclose(out, plain / np.array([[1, 2], [1, 2], [3, 4]]), rtol=1e-6)


def test_dynamic_is_exactly_plain_up_to_the_original_length_and_grows_theta_beyond():
    rope = RopeConfig(1e4, "dynamic", 2.0, original_max_position=100)
    out = np.asarray(rope_frequencies(rope, 32, jnp.array([1, 100, 101, 250])))
    plain = rope_frequencies(RopeConfig(1e4), 32)
    np.testing.assert_array_equal(out[:2], [plain, plain])
    for row, length in zip(out[2:], (101, 250), strict=True):
        theta = 1e4 * (2.0 * length / 100 - 1.0) ** (32 / 30)
        expected = theta ** -(np.arange(0, 32, 2) / 32)
        np.testing.assert_allclose(row, expected, rtol=1e-6)


@pytest.mark.parametrize("rope", [LONG, RopeConfig(1e4, "dynamic", 2.0)], ids=lambda rope: rope.kind)
def test_a_length_is_asked_for_where_it_matters(rope):
    with pytest.raises(AssertionError, match=rope.kind):
        rope_frequencies(rope, 4)
