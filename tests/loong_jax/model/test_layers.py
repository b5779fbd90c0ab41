"""Building blocks against definitions written another way."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.model.layers import gated, linear, rms_norm


def test_rms_norm_is_float32_inside():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) * 100
    weight = np.arange(1, 9, dtype=np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5), expected, rtol=1e-6)
    assert rms_norm(jnp.asarray(x), jnp.asarray(weight, jnp.bfloat16), 1e-5).dtype == jnp.bfloat16


def test_norm_weights_may_be_offsets_from_one():
    x, weight = jnp.asarray([[3.0, -4.0]]), jnp.asarray([0.5, -0.5])
    np.testing.assert_allclose(rms_norm(x, weight, 0.0, 1.0), rms_norm(x, 1 + weight, 0.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_accumulates_in_float32(dtype):
    # A sum of many ones beyond what bfloat16 can count.
    out = linear(jnp.ones((1, 4096), dtype), jnp.ones((4096, 3), dtype))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 4096.0)
    out = linear(jnp.ones((1, 4097), dtype), jnp.ones((4097, 3), dtype))
    np.testing.assert_array_equal(out, 4097.0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation):
    gate, up = np.array([[-1.0, 2.0]]), np.array([[3.0, 5.0]])
    out = gated(jnp.asarray(np.concatenate([gate, up], axis=1), jnp.float32), activation)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(out, (gate / (1 + np.exp(-gate)) if activation == "silu" else gelu) * up, rtol=1e-5)
