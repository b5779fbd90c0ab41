"""Sampling against plain numpy, and the independence of a row from its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.model.sampling import PREFILTER, sample

SAMPLE = jax.jit(sample)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0):
    rows = len(logits)
    full = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))
    tokens, logprobs = SAMPLE(
        jnp.asarray(logits, jnp.float32),
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(seed, jnp.uint32),
        full(position, jnp.int32),
    )
    return np.asarray(tokens), np.asarray(logprobs)


def kept_by(logits, temperature, top_k, top_p):
    """The set of tokens that top-k, then top-p, keep."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled)[: top_k or len(scaled)]
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    return set(order[(before < top_p) | (np.arange(len(order)) == 0)].tolist())


def random_logits(rows, vocab_size, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(size=(rows, vocab_size)) * scale


def test_greedy_is_argmax_with_raw_logprob():
    logits = random_logits(5, 300)
    tokens, logprobs = draw(logits, temperature=0.0, top_k=3, top_p=0.1)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    expected = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("vocab_size", "temperature", "top_k", "top_p"),
    [
        (50, 0.7, 5, 1.0),
        (50, 1.3, 0, 0.6),
        (50, 1.0, 10, 0.5),
        (1000, 1.0, 0, 0.5),
        (1000, 5.0, 0, 0.95),  # the nucleus does not fit in the prefilter
        (1000, 1.0, PREFILTER + 50, 1.0),
        (1000, 1.0, 2000, 0.3),
        (50, 1.0, 0, 0.0),  # never empty
    ],
)
def test_filters_keep_what_the_definition_keeps(vocab_size, temperature, top_k, top_p):
    logits = random_logits(1, vocab_size)[0]
    num_draws = 4000
    tokens, _ = draw(np.tile(logits, (num_draws, 1)), temperature, top_k, top_p, position=np.arange(num_draws))
    kept = kept_by(logits, temperature, top_k, top_p)
    assert set(tokens.tolist()) <= kept
    if len(kept) <= 20:
        assert set(tokens.tolist()) == kept


def test_draws_follow_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    num_draws = 20_000
    tokens, logprobs = draw(np.tile(logits, (num_draws, 1)), position=np.arange(num_draws))
    frequencies = np.bincount(tokens, minlength=4) / num_draws
    np.testing.assert_allclose(frequencies, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(logprobs, logits[tokens], atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    logits = random_logits(6, 400)
    parameters = {
        "temperature": np.array([1.0, 0.0, 0.5, 2.0, 1.0, 3.0]),
        "top_k": np.array([0, 0, 5, 0, 300, 0]),
        "top_p": np.array([1.0, 1.0, 0.9, 0.7, 1.0, 0.99]),
        "seed": np.arange(6),
        "position": np.arange(6) * 100,
    }
    together = draw(logits, **parameters)
    for row in range(6):
        alone = draw(logits[row : row + 1], **{name: value[row : row + 1] for name, value in parameters.items()})
        assert alone[0][0] == together[0][row]


def test_noise_is_keyed_by_seed_and_position():
    logits = np.zeros((1, 1000))
    base = draw(logits, seed=1, position=5)[0][0]
    assert draw(logits, seed=1, position=5)[0][0] == base
    assert draw(logits, seed=2, position=5)[0][0] != base
    assert draw(logits, seed=1, position=6)[0][0] != base


def test_tiny_temperature_is_greedy_and_finite():
    logits = random_logits(4, 100)
    tokens, logprobs = draw(logits, temperature=1e-30, top_p=0.5)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert np.isfinite(logprobs).all()
