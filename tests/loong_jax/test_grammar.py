"""Matchers of grammars: what may come next, the same in every copy, and what happens when one gives up."""

import json

import numpy as np
import pytest

from loong_jax.default_model import DEFAULT_MODEL
from loong_jax.grammar import GrammarError, Grammars, is_available
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, byte_level

TOKENIZER = byte_level().to_str()
AB = "start: /ab?/"


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB_SIZE, (EOS,))


def fail(reason: str) -> None:
    raise AssertionError(reason)


def allowed(matcher) -> list[int]:
    bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def test_the_package_is_an_extra_of_the_tests():
    assert is_available()


def test_the_end_is_allowed_where_the_answer_may_end(grammars):
    matcher = grammars.matcher(AB, fail)
    assert allowed(matcher) == [ord("a")]
    matcher.take(ord("a"))
    assert allowed(matcher) == [ord("b"), EOS]
    matcher.take(ord("b"))
    assert allowed(matcher) == [EOS]


def test_answers_do_not_share_how_far_they_came(grammars):
    first, second = grammars.matcher(AB, fail), grammars.matcher(AB, fail)
    first.take(ord("a"))
    assert allowed(second) == [ord("a")]


def test_there_is_a_bit_for_each_token_of_a_larger_vocabulary():
    words = Grammars(TOKENIZER, 1000, (EOS,)).matcher(AB, fail).allowed()
    assert words is not None
    assert len(words) * 32 >= 1000


def test_every_end_of_sequence_token_ends():
    matcher = Grammars(TOKENIZER, VOCAB_SIZE, (EOS, EOS - 1)).matcher(AB, fail)
    matcher.take(ord("a"))
    assert allowed(matcher) == [ord("b"), EOS - 1, EOS]


def test_a_matcher_gives_up_once_and_says_why(grammars):
    told: list[str] = []
    matcher = grammars.matcher(AB, told.append)
    matcher.take(ord("x"))
    matcher.take(ord("a"))
    assert matcher.allowed() is None
    assert len(told) == 1
    assert told[0].startswith(f"the grammar gave up: token {ord('x')} is outside the grammar")


def test_too_much_work_is_given_up(grammars):
    told: list[str] = []
    matcher = grammars.matcher("start: /((a{1,1000}){1,1000}){1,1000}/", told.append)
    while not told:
        matcher.allowed()
        matcher.take(ord("a"))
    assert "the grammar gave up: " in told[0]


def test_what_does_not_compile(grammars):
    told: list[str] = []
    assert grammars.matcher("start: /((/", told.append).allowed() is None
    assert "unclosed group" in told[0]
    with pytest.raises(GrammarError, match="unclosed group"):
        grammars.prepare("start: /((/")


@pytest.mark.parametrize("content", ["gpt2", "/etc/passwd", "[]", '{"model": 1}'])
def test_a_tokenizer_that_cannot_be_used(content):
    with pytest.raises(GrammarError, match=r"tokenizer\.json"):
        Grammars(content, 100, (1,))


def test_the_default_model_has_grammars():
    config = json.loads((DEFAULT_MODEL / "config.json").read_text())
    content = (DEFAULT_MODEL / "tokenizer.json").read_text()
    Grammars(content, config["vocab_size"], (config["eos_token_id"],)).prepare(AB)
