"""The oracle against log-probabilities recorded from `transformers` (scripts/record_transformers.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.model.oracle import QUERY_BLOCK, causal_attention
from tests.support.fixtures import FIXTURES, FLOAT32_NAMES, load_fixture, random_prompt

NUM_PROMPTS = 7  # of 5 to 6,000 tokens


@pytest.mark.parametrize("name", FLOAT32_NAMES)
def test_transformers_agrees_within_1e_3(name):
    oracle = load_fixture(name).oracle
    recorded = np.load(FIXTURES / "recorded" / f"{name}.npz")
    lengths = []
    for i in range(NUM_PROMPTS):
        tokens, positions, greedy = (recorded[f"{key}_{i}"] for key in ("tokens", "positions", "greedy"))
        lengths.append(len(tokens))
        # Teacher-forced over the prompt and the recorded greedy continuation at once.
        logprobs = oracle.logprobs(np.concatenate([tokens, greedy]))
        top = np.take_along_axis(logprobs[positions], recorded[f"top_ids_{i}"], axis=1)
        np.testing.assert_allclose(top, recorded[f"top_{i}"], atol=1e-3)
        following = np.append(tokens[1:], greedy[0])[positions]
        np.testing.assert_allclose(logprobs[positions, following], recorded[f"next_{i}"], atol=1e-3)
        steps = np.arange(len(tokens) - 1, len(tokens) - 1 + len(greedy))
        np.testing.assert_allclose(logprobs[steps, greedy], recorded[f"greedy_logprobs_{i}"], atol=1e-3)
        sure = recorded[f"greedy_margins_{i}"] > 1e-3
        np.testing.assert_array_equal(logprobs[steps].argmax(-1)[sure], greedy[sure])
    assert min(lengths) == 5
    assert max(lengths) == 6000


def test_blocked_attention_equals_dense_attention():
    rng = np.random.default_rng(0)
    num_tokens, dim = 2 * QUERY_BLOCK, 8
    q, k, v = (rng.normal(size=(num_tokens, heads, dim)).astype(np.float32) for heads in (4, 2, 2))
    expected = np.zeros_like(q)
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / np.sqrt(dim)
        weights = np.where(np.tri(num_tokens, dtype=bool), np.exp(scores), 0.0)
        expected[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // 2]
    np.testing.assert_allclose(causal_attention(*map(jnp.asarray, (q, k, v))), expected, atol=1e-5)


def test_padding_is_invisible():
    fixture = load_fixture("gqa")
    tokens = random_prompt(fixture.config, 300)
    whole = fixture.oracle.logprobs(tokens)
    for length in (1, 16, 17, 255, 257):
        np.testing.assert_allclose(fixture.oracle.logprobs(tokens[:length]), whole[:length], atol=1e-4)


def test_greedy_follows_the_likeliest_token():
    fixture = load_fixture("mha")
    tokens = random_prompt(fixture.config, 12).tolist()
    out = fixture.oracle.greedy(tokens, 3)
    rows = fixture.oracle.logprobs(tokens + out)
    assert out == rows[len(tokens) - 1 : -1].argmax(-1).tolist()
