"""The oracle against log-probabilities recorded from `transformers` (scripts/record_transformers.py)."""

from typing import NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from loong_jax.config import RopeConfig
from loong_jax.model.oracle import QUERY_BLOCK, Oracle, causal_attention
from tests.support.fixtures import FAMILY_NAMES, FIXTURES, FLOAT32_NAMES, load_fixture, random_prompt

CHANGES = [
    ("mistral", {"windows": ()}),
    ("mistral", {"windows": (51, 51)}),
    ("mistral", {"rope": RopeConfig()}),
    ("qwen2", {"windows": (40, 40)}),
    ("qwen2", {"windows": (40, 0)}),
    ("qwen2", {"rope": RopeConfig(1e5)}),
    ("qwen3", {"rope": RopeConfig(1e4)}),
    ("gemma2", {"attn_soft_cap": None}),
    ("gemma2", {"logit_soft_cap": None}),
    ("gemma2", {"query_scalar": None}),
    ("gemma3", {"window_rope": None}),
    ("gemma3", {"windows": (30, 30, 30)}),
    ("longrope", {"rope": RopeConfig()}),
]


class Recording(NamedTuple):
    """One prompt as `transformers` saw it. `whole`: the prompt, and the greedy text after it, except where dynamic
    rotation is beyond its original length: there `transformers` lets cached keys age, and only the prompt compares."""

    tokens: np.ndarray
    positions: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray
    next: np.ndarray
    greedy: np.ndarray
    greedy_logprobs: np.ndarray
    greedy_margins: np.ndarray

    def whole(self, rope: RopeConfig) -> np.ndarray:
        text = np.concatenate([self.tokens, self.greedy])
        return self.tokens if rope.kind == "dynamic" and len(text) > rope.original_max_position else text


def recordings(name) -> list[Recording]:
    recorded = np.load(FIXTURES / "recorded" / f"{name}.npz")
    count = sum(key.startswith("tokens_") for key in recorded.files)
    return [Recording(*(recorded[f"{field}_{i}"] for field in Recording._fields)) for i in range(count)]


def worst(oracle: Oracle, recording: Recording) -> float:
    """Largest difference of a log-probability, of the prompt and of the greedy text, teacher-forced at once."""
    text = recording.whole(oracle.config.rope)
    logprobs = oracle.logprobs(text)
    positions, following = recording.positions, np.append(recording.tokens[1:], recording.greedy[0])
    out = [np.take_along_axis(logprobs[positions], recording.top_ids, axis=1) - recording.top]
    out.append(logprobs[positions, following[positions]] - recording.next)
    if len(text) > len(recording.tokens):
        steps = np.arange(len(recording.tokens) - 1, len(text) - 1)
        out.append(logprobs[steps, recording.greedy] - recording.greedy_logprobs)
        sure = recording.greedy_margins > 1e-3
        np.testing.assert_array_equal(logprobs[steps].argmax(-1)[sure], recording.greedy[sure])
    return max(float(np.abs(difference).max()) for difference in out)


@pytest.mark.parametrize("name", FLOAT32_NAMES + FAMILY_NAMES)
def test_transformers_agrees_within_1e_3(name):
    oracle, recorded = load_fixture(name).oracle, recordings(name)
    for recording in recorded:
        assert worst(oracle, recording) < 1e-3, len(recording.tokens)
    lengths = [len(recording.tokens) for recording in recorded]
    assert (min(lengths), max(lengths)) == (5, 6000 if name in FLOAT32_NAMES else 2500)


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=str)
def test_a_wrong_configuration_is_noticed(name, change):
    """The recordings have the power to see each of these."""
    fixture = load_fixture(name)
    assert msgspec.structs.replace(fixture.config, **change) != fixture.config
    length = {"longrope": 1000, "qwen3": 2500}.get(name, 250)  # beyond the original length of the former
    recording = next(r for r in recordings(name) if len(r.tokens) == length)
    oracle = Oracle(msgspec.structs.replace(fixture.config, **change), fixture.params)
    logprobs = oracle.logprobs(recording.tokens)[recording.positions]
    assert np.abs(np.take_along_axis(logprobs, recording.top_ids, axis=1) - recording.top).max() > 1e-2


@pytest.mark.parametrize("name", ["longrope", "qwen3"])
def test_the_length_a_request_was_admitted_with_matters(name):
    fixture = load_fixture(name)
    tokens, original = random_prompt(fixture.config, 100), fixture.config.rope.original_max_position
    short, same, long = (fixture.oracle.logprobs(tokens, length) for length in (100, original, 2 * original))
    np.testing.assert_array_equal(short, same)
    assert np.abs(long - short).max() > 1e-2


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
