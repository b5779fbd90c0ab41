"""The checker in this process: its answers. Its limits are seen in test_structured.py, from outside."""

import pytest

from loong_jax.grammar import open_tokenizer
from serving.grammar_checker import answer, grammar_of
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, byte_level


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(byte_level().to_str(), VOCAB_SIZE, (EOS,))


def test_a_grammar_or_an_error(tokenizer):
    assert answer(tokenizer, {"kind": "regex", "text": "a"}) == {"grammar": grammar_of("regex", "a")}
    refused = answer(tokenizer, {"kind": "regex", "text": "("})
    assert list(refused) == ["error"]
    assert "\n" not in refused["error"]


def test_deep_nesting_is_an_error(tokenizer):
    assert "recursion" in answer(tokenizer, {"kind": "json_schema", "text": "[" * 100_000})["error"]
