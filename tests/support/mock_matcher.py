"""A grammar without a language: after each text of an answer, half of the vocabulary is allowed, by a hash of the text
and of the grammar's name. So an answer whose matcher was told a wrong text, twice or not at all comes out otherwise.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence

import numpy as np


def allowed(grammar: str, answer: Sequence[int], vocab_size: int) -> np.ndarray:
    """From the definition: bool `[vocab]`."""
    seed = zlib.crc32(array("i", answer).tobytes(), zlib.crc32(grammar.encode()))
    return np.random.default_rng(seed).permutation(vocab_size) < -(-vocab_size // 2)


class MockMatcher:
    """`row_adjust.Matcher`."""

    def __init__(self, grammar: str, vocab_size: int) -> None:
        self._grammar, self._vocab_size = grammar, vocab_size
        self._answer: list[int] = []

    def take(self, token: int) -> None:
        self._answer.append(token)

    def allowed(self) -> np.ndarray:
        bits = np.zeros(32 * (-(-self._vocab_size // 32) + 1), bool)  # a word more, as llguidance gives
        bits[: self._vocab_size] = allowed(self._grammar, self._answer, self._vocab_size)
        return np.packbits(bits, bitorder="little").view(np.uint32)


class MockGrammars:
    """In place of `loong_jax.grammar.Grammars`."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def matcher(self, grammar: str, failed: Callable[[str], None]) -> MockMatcher:
        return MockMatcher(grammar, self._vocab_size)
