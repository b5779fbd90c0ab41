"""Biases, bans and penalties against plain numpy, through the mirror that fills the step's data."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_jax.config import ClusterConfig
from loong_jax.esp.layout import adjust_layout, step_shape
from loong_jax.model.adjust import TILE, adjust
from loong_jax.row_adjust import RowAdjust
from loong_jax.types import Adjust, Adjustment, Phase, Program
from tests.support import sampling_reference as reference
from tests.support.mock_matcher import MockMatcher

VOCAB, NUM_ROWS = 700, 4  # entries in three tiles, the last one partial; a last word of few bits
SHAPE = step_shape(Program(Phase.DECODE, 1, NUM_ROWS), ClusterConfig(8), "cpu", VOCAB)
LAYOUT = adjust_layout(SHAPE, NUM_ROWS)
ADJUST = jax.jit(lambda logits, packed: adjust(logits, LAYOUT.unpack(packed)))

tokens = st.integers(0, VOCAB - 1)
texts = st.one_of(
    st.lists(tokens, max_size=30),
    st.integers(1, VOCAB).map(lambda n: list(range(n))),  # many tiles
    st.integers(1, 60).map(lambda n: [VOCAB - 1] * n),  # one token again and again
)
adjustments = st.builds(
    Adjustment,
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=20).map(
        lambda d: tuple(sorted(d.items()))
    ),
    min_tokens=st.sampled_from((0, 0, 1, 10, 100)),
    repetition_penalty=st.sampled_from((1.0, 1.0, 0.5, 1.3, 10.0)),
    frequency_penalty=st.sampled_from((0.0, 0.0, -2.0, 0.1, 2.0)),
    presence_penalty=st.sampled_from((0.0, 0.0, -2.0, 0.5, 2.0)),
    grammar=st.sampled_from(("", "", "a", "b")),
)
rows = st.tuples(adjustments, texts.filter(bool), texts, st.lists(tokens, max_size=5, unique=True).map(tuple))


def mirror_of(adjustment, prompt, generated, stop_ids) -> RowAdjust:
    ids = np.array(prompt, "<i4").tobytes()
    matcher = MockMatcher(adjustment.grammar, VOCAB) if adjustment.grammar else None
    mirror = RowAdjust(Adjust(0, adjustment, ids, len(prompt), stop_ids), VOCAB, matcher)
    for position, token in enumerate([*prompt, *generated][len(prompt) - 1 :], len(prompt) - 1):
        mirror.observe(position, token)
        mirror.observe(position, token)  # a step that failed is issued again
    return mirror


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(rows, min_size=1, max_size=NUM_ROWS))
def test_every_combination_is_the_definition(batch):
    """Some rows are adjusted, the others are left as they are, bit for bit."""
    logits = np.random.default_rng(len(batch)).normal(size=(NUM_ROWS, VOCAB)).astype(np.float32) * 4
    packed = np.zeros((1, LAYOUT.size), np.int32)
    fields = LAYOUT.views(packed)
    for index, (adjustment, prompt, generated, stop_ids) in enumerate(batch):
        mirror = mirror_of(adjustment, prompt, generated, stop_ids)
        mirror.write(fields, (0, index), len(prompt) + len(generated))
    out = np.asarray(ADJUST(jnp.asarray(logits), jnp.asarray(packed[0])))
    np.testing.assert_array_equal(out[len(batch) :], logits[len(batch) :])
    for index, (adjustment, prompt, generated, stop_ids) in enumerate(batch):
        expected = reference.adjusted(logits[index], adjustment, prompt, generated, stop_ids)
        banned = np.isneginf(expected)
        assert (out[index][banned] < -1e28).all()
        np.testing.assert_allclose(out[index][~banned], expected[~banned], rtol=1e-5, atol=1e-4)


def test_a_blank_changes_nothing():
    logits = np.random.default_rng(0).normal(size=(NUM_ROWS, VOCAB)).astype(np.float32)
    out = ADJUST(jnp.asarray(logits), jnp.zeros(LAYOUT.size, jnp.int32))
    np.testing.assert_array_equal(out, logits)


def test_tiles_are_several():
    assert VOCAB > 2 * TILE
    assert VOCAB % TILE
    assert VOCAB % 32
