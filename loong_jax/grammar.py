"""Grammars of answers: which tokens of a model's vocabulary may come next, by `llguidance` (an extra).

What it is: `Grammars`, one per process, made from a checkpoint's tokenizer; it compiles grammars, keeps the latest, and
gives each request a matcher of its own. A grammar is llguidance's text form; what it allows after the same tokens is
the same in every process, and work is bounded by counts, never by a clock.
What it is not: what clients may write (`serving/structured.py`), or a bound on compiling. That is not safe here: some
schemas of a few bytes take minutes, so a server compiles first in a process that it can end (`serving/structured.py`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

_KEPT = 64
"""Compiled grammars at hand; requests with others compile again."""

LIMITS = {"step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_lexer_states": 100_000, "verbose_errors": False}
"""Work of one mask (by llguidance's own rates 15 ms or so at most), and of one grammar (about 2 KB a state)."""


class GrammarError(ValueError):
    """A tokenizer, or a grammar, that cannot be used."""


def is_available() -> bool:
    """Whether the package of the extra is there."""
    return find_spec("llguidance") is not None


def open_tokenizer(tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]):
    """The vocabulary as llguidance wants it. Raises GrammarError."""
    import llguidance

    if not tokenizer_json.lstrip().startswith("{"):  # anything else it takes for a name of the hub, or a path
        raise GrammarError("tokenizer.json is no JSON object")
    try:
        tokenizer = llguidance.LLTokenizer(tokenizer_json, eos_token=list(eos_ids))
        if tokenizer.vocab_size < vocab_size:
            tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_ids))
        return tokenizer
    except Exception as error:  # the library's own kinds
        raise GrammarError(f"tokenizer.json: {str(error)[:300]}") from error


def compiled(tokenizer, grammar: str):
    """A matcher at the start of an answer. Raises GrammarError."""
    import llguidance

    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise GrammarError(matcher.get_error()[:500])
    return matcher


class TokenMatcher:
    """How far one answer has come. `failed` is told, once, why it cannot go on."""

    def __init__(self, matcher, failed: Callable[[str], None]) -> None:
        self._matcher = matcher
        self._failed = failed

    def take(self, token: int) -> None:
        """The next token of the answer."""
        if self._matcher is not None and not self._matcher.consume_token(token):
            self._give_up(f"token {token} is outside the grammar: {self._matcher.get_error()[:300]}")

    def allowed(self) -> np.ndarray | None:
        """As `row_adjust.Matcher`. End-of-sequence tokens are allowed where the answer may end."""
        if self._matcher is None:
            return None
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if not self._matcher.is_error() and words.any():
            return words
        return self._give_up(self._matcher.get_error()[:300] or "no token may follow")

    def _give_up(self, reason: str) -> None:
        self._matcher = None
        self._failed(f"the grammar gave up: {reason}")


class Grammars:
    """Compiles and keeps grammars; any thread may ask. `eos_ids`: what ends an answer. Raises GrammarError."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.tokenizer_json, self.vocab_size, self.eos_ids = tokenizer_json, vocab_size, tuple(eos_ids)
        self._tokenizer = open_tokenizer(tokenizer_json, vocab_size, eos_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, object] = OrderedDict()

    def matcher(self, grammar: str, failed: Callable[[str], None]) -> TokenMatcher:
        """A new answer's. A grammar that does not compile, as none that was checked, gives up at once."""
        try:
            return TokenMatcher(self._fresh(grammar), failed)
        except GrammarError as error:
            failed(str(error))
            return TokenMatcher(None, failed)

    def prepare(self, grammar: str) -> None:
        """Compile it now, so that `matcher` need not. Raises GrammarError."""
        self._fresh(grammar)

    def _fresh(self, grammar: str):
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar].deep_copy()  # pyright: ignore[reportAttributeAccessIssue]
        matcher = compiled(self._tokenizer, grammar)
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return matcher.deep_copy()
