"""Training sequences: what is in them, where loss falls, and how positions reach far."""

import random
from itertools import combinations

import numpy as np
import pytest
from needle.sequences import ASKED, DECOY, PROSE, Content, _facts, batch
from needle.tokens import BOS_ID, Corpus, Tokens
from tokenizers import Tokenizer

from loong_jax.default_model import DEFAULT_MODEL

REACH = 131_072


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json")))


@pytest.fixture(scope="module")
def corpora(tokens) -> tuple[Corpus, Corpus]:
    ids = np.array(tokens.encode(" The sky is blue. The sun is yellow." * 100), np.int32)
    corpus = Corpus(ids, np.arange(0, 400, 40))
    return corpus, corpus


@pytest.mark.parametrize("drills", [0.0, 1.0])
@pytest.mark.parametrize("length", [128, 512])
def test_every_answer_was_said_before_and_only_answers_weigh_most(tokens, corpora, length, drills):
    data = batch(random.Random(0), tokens, corpora, Content(length, drills, (1, 3), 0.75, 0.6), 16, REACH)
    assert data.ids.shape == (16, length)
    for ids, weights, kinds in zip(data.ids, data.weights, data.kinds, strict=True):
        assert ids[0] == BOS_ID
        text = tokens.tokenizer.decode(ids.tolist())
        answers = np.flatnonzero(weights == 10.0)  # first digits
        assert len(answers)
        for at in answers:
            end = at + int(np.argmax(weights[at:] < 8.0))
            value = tokens.tokenizer.decode(ids[at:end].tolist())
            assert text.count(value) >= 2
            assert (kinds[at:end] == ASKED).all()
        assert {PROSE, ASKED} <= set(kinds.tolist()) <= {PROSE, ASKED, DECOY}


def test_positions_leap_between_chunks_only_and_stay_below_the_reach(tokens, corpora):
    data = batch(random.Random(1), tokens, corpora, Content(256, 0.5, (1, 3), 0.75, 0.6), 64, REACH)
    steps, new_chunk = np.diff(data.positions), np.diff(data.chunks)
    assert (steps >= 1).all()
    assert ((steps > 1) == (new_chunk == 1)).all()
    assert REACH // 2 < data.positions.max() < REACH
    assert (data.positions.max(1) == 255).any()  # some are whole
    # A fact and a question are never torn: within them every step is 1.
    inside = data.weights[:, 1:] == 8.0
    assert (steps[inside] == 1).all()


def test_the_same_seed_makes_the_same_batch(tokens, corpora):
    content = Content(128, 0.5, (1, 3), 0.75, 0.6)
    first, again = (batch(random.Random("7 3"), tokens, corpora, content, 4, REACH) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = batch(random.Random("7 4"), tokens, corpora, content, 4, REACH)
    assert (first.ids != other.ids).any()


def test_near_misses_are_as_many_as_asked():
    def shared(near_misses: float) -> float:
        content = Content(128, 0.0, (5,), near_misses, 0.0)
        found = [_facts(random.Random(seed), 4, (5,), content) for seed in range(200)]
        pairs = [(a.key, b.key) for facts in found for a, b in combinations(facts, 2)]
        return sum(a[0] == b[0] or a[1] == b[1] for a, b in pairs) / len(pairs)

    assert shared(0.0) < 0.05 < 0.15 < shared(0.5) < shared(1.0)
