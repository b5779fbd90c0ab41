"""Facts, their questions and near misses, and how the tokenizer sees them."""

import random
import string

import pytest
from needle.facts import KINDS, PASS_KEY, Fact, near_miss, random_key, random_value
from needle.text import ADJECTIVES, NOUNS
from needle.tokens import Tokens
from tokenizers import Tokenizer

from loong_jax.default_model import DEFAULT_MODEL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeated", [False, True])
def test_a_fact_says_key_and_value_and_its_question_ends_before_the_value(kind, repeated):
    fact = Fact(kind, ("red", "garden"), "04213", repeated)
    assert "red garden" in fact.text
    assert "red garden" in fact.question
    assert fact.text.count("04213") == 1 + (repeated and kind == "pass_key")
    assert "04213" not in fact.question
    # The question's last words are the fact's words before the value, so the answer goes on as the fact does.
    assert fact.question.endswith(fact.parts[0].strip())


def test_near_misses_share_one_word_and_are_not_in_use():
    rng = random.Random(0)
    used = {PASS_KEY, ("red", "garden")}
    for key in used:
        for _ in range(200):
            other = near_miss(rng, key, used)
            assert (other[0] == key[0]) != (other[1] == key[1])
            assert other not in used
    assert all(random_key(rng, used) not in used for _ in range(200))
    assert len({random_value(rng) for _ in range(100)}) > 90
    assert all(len(random_value(rng, 7)) == 7 for _ in range(10))


def test_each_word_is_one_token_and_parts_are_tokenized_as_their_whole():
    tokens = Tokens(Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json")))
    assert all(len(tokens.encode(f" {word}")) == 1 for word in (*ADJECTIVES, *NOUNS, *string.digits))
    for kind in KINDS:
        fact = Fact(kind, ("red", "garden"), "90417", repeated=True)
        parts = [*fact.parts, fact.question, f" {fact.value}", "."]
        assert sum((tokens.encode(part) for part in parts), ()) == tokens.encode("".join(parts))
        assert len(tokens.encode(f" {fact.value}")) == 5
