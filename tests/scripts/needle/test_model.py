"""The model of training computes what the engine computes from the checkpoint it wrote."""

import jax
import jax.numpy as jnp
import numpy as np
from needle.model import Shape, forward, init, save

from loong_jax.default_model import DEFAULT_MODEL
from tests.support.fixtures import load_directory

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=48)


def test_the_engine_computes_what_training_did(tmp_path):
    params = init(SHAPE, 0)
    save(tmp_path, SHAPE, params, DEFAULT_MODEL / "tokenizer.json")
    ids = np.random.default_rng(0).integers(2, SHAPE.vocab, 48)
    logits = forward(SHAPE, params, jnp.asarray(ids)[None], jnp.arange(48)[None], jnp.zeros((1, 48, 48)))[0]
    expected = load_directory(tmp_path).oracle.logprobs(ids)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=2e-4)


def test_a_bias_of_a_logarithm_is_as_many_copies_of_a_key():
    """Three copies of a key and value weigh as one whose logit is raised by ln 3."""
    params = init(Shape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=32), 1)
    shape = Shape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=32)
    copies, once = jnp.array([[5, 7, 7, 7, 9]]), jnp.array([[5, 7, 9]])
    many = forward(shape, params, copies, jnp.array([[0, 1, 1, 1, 2]]), jnp.zeros((1, 5, 5)))
    bias = jnp.zeros((1, 3, 3)).at[:, :, 1].set(jnp.log(3.0))
    few = forward(shape, params, once, jnp.array([[0, 1, 2]]), bias)
    np.testing.assert_allclose(many[0, -1], few[0, -1], atol=1e-4)
