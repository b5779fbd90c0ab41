"""Sampling against plain numpy, and the independence of a row from its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_jax.model.sampling import PREFILTER, Params, first_largest, likeliest, logprobs_of, sample
from loong_jax.types import Sampling
from tests.support import sampling_reference as reference


@jax.jit
def sample_all(logits, params: Params):
    tokens = sample(logits, params)
    return tokens, logprobs_of(logits, tokens)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    rows = len(logits)
    full = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))
    params = Params(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(min_p, jnp.float32),
        full(seed, jnp.uint32),
        full(position, jnp.int32),
    )
    tokens, logprobs = sample_all(jnp.asarray(logits, jnp.float32), params)
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
        "min_p": np.array([0.2, 0.9, 0.0, 0.0, 0.1, 0.0]),
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


NUM_ROWS, VOCAB = 8, 300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from((0.0, 0.01, 0.3, 1.0, 2.5, 100.0)),
            top_k=st.sampled_from((0, 0, 1, 3, 40, 280, 300)),
            top_p=st.sampled_from((1.0, 1.0, 0.05, 0.4, 0.9, 0.999)),
            min_p=st.sampled_from((0.0, 0.0, 0.01, 0.2, 0.9, 1.0)),
            seed=st.integers(0, 2**32 - 1),
        ),
        min_size=NUM_ROWS,
        max_size=NUM_ROWS,
    ),
    st.integers(0, 2**20),
)
def test_every_combination_is_the_definition(samplings: list[Sampling], position: int):
    """A token is the definition's; only where two candidates differ by rounding may it be the other."""
    logits = random_logits(NUM_ROWS, VOCAB, seed=position, scale=3.0).astype(np.float32)
    fields = {name: np.array([getattr(s, name) for s in samplings]) for name in Sampling.__struct_fields__[:-1]}
    tokens, _ = draw(logits, position=position, **fields)
    for row, sampling in enumerate(samplings):
        scores = reference.scores(logits[row], sampling, position)
        # The filters cut at a sum of float32: which of two neighbours at the cut is the last may differ.
        if np.argmax(scores) != tokens[row]:
            looser = Sampling(
                sampling.temperature, sampling.top_k, min(1.0, sampling.top_p * (1 + 1e-5)), sampling.seed,
                sampling.min_p * (1 - 1e-5),
            )  # fmt: skip
            tighter = Sampling(
                sampling.temperature, sampling.top_k, sampling.top_p * (1 - 1e-5), sampling.seed,
                sampling.min_p * (1 + 1e-5),
            )  # fmt: skip
            others = [reference.scores(logits[row], other, position) for other in (looser, tighter)]
            near = [s for s in (scores, *others) if s[tokens[row]] >= s.max() - 1e-4]
            assert near, (sampling, position)


def test_min_p_comes_before_top_p():
    """Of 0.5, 0.3, 0.15, 0.05, min-p 0.4 leaves the first two; three quarters of *their* mass need both."""
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    tokens, _ = draw(np.tile(logits, (2000, 1)), min_p=0.4, top_p=0.6, position=np.arange(2000))
    assert set(tokens.tolist()) == {0}
    tokens, _ = draw(np.tile(logits, (2000, 1)), min_p=0.4, top_p=0.75, position=np.arange(2000))
    assert set(tokens.tolist()) == {0, 1}


def test_likeliest_tokens_are_those_of_the_raw_logits():
    logits = random_logits(5, 300)
    tokens, logprobs = jax.jit(likeliest, static_argnums=1)(jnp.asarray(logits, jnp.float32), 20, jnp.array(True))
    order = np.argsort(-logits, axis=1)[:, :20]
    np.testing.assert_array_equal(tokens, order)
    expected = np.stack([reference.logprobs(row) for row in logits])
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, order, 1), atol=1e-5)
    tokens, logprobs = likeliest(jnp.asarray(logits, jnp.float32), 20, jnp.array(False))
    assert not np.any(tokens)
    assert not np.any(logprobs)


def test_the_first_of_the_largest_is_taken():
    values = np.zeros((4, 300), np.float32)
    values[0, [7, 9]] = 2
    values[1] = -np.inf
    values[2, 299] = np.inf
    values[3] = np.nan
    assert first_largest(jnp.asarray(values)).tolist() == [7, 0, 299, 299]
    noise = np.random.default_rng(0).integers(-50, 50, (64, 300)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(first_largest(jnp.asarray(noise)), noise.argmax(axis=1))
