"""The host's mirror of what alters the logits of adjusted requests: biases, bans, the tokens counted so far, and which
tokens a grammar allows next.

What it is: one `RowAdjust` per adjusted request, fed by its rows: each emitting row of a request with penalties or a
grammar names the newest token, so a command carries one token however long the text is, and every process of an engine
counts alike.
What it is not: the arithmetic on logits (`model/adjust.py`), grammars (`grammar.py`), or anything that knows JAX.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from loong_jax.types import Adjust, Adjustment

BAN = -1e30
"""Added to a logit that must not be sampled, or in its place: far below every other, and finite whatever is done to it
later."""

TOKEN, BEFORE, AFTER = range(3)
"""Lines of the entries: the token, bits of the addend before the repetition penalty, and after it."""


def max_entries(adjustment: Adjustment, stop_ids: tuple[int, ...], max_tokens: int, vocab_size: int) -> int:
    """Most entries a request may come to need: what `ClusterConfig.adjust_tokens` bounds."""
    banned = stop_ids if adjustment.min_tokens else ()
    fixed = len({token for token, _ in adjustment.logit_bias} | set(banned))
    return min(vocab_size, fixed + (max_tokens - 1 if adjustment.counts_output else 0))


class Matcher(Protocol):
    """How far one answer has come in its grammar."""

    def take(self, token: int) -> None:
        """The next token of the answer."""
        ...

    def allowed(self) -> np.ndarray | None:
        """Tokens that may follow: uint32 words, at least one bit for each token of the vocabulary, token t at bit
        t % 32 of word t // 32. None when it gave up: any may."""
        ...


class RowAdjust:
    """What a row of the step gets (`adjust_layout`), kept up to date token by token. `matcher`: of the grammar, where
    there is one."""

    def __init__(self, command: Adjust, vocab_size: int, matcher: Matcher | None = None):
        self.adjustment = adjustment = command.adjustment
        self._num_prompt = command.num_prompt
        self._num_counted = command.num_prompt
        self._banned = dict.fromkeys(command.stop_ids if adjustment.min_tokens else ())
        bias = dict(adjustment.logit_bias)
        tokens = [*self._banned, *(token for token in bias if token not in self._banned)]
        self._index = {token: index for index, token in enumerate(tokens)}
        self._counts: dict[int, int] = {}
        self._entries = np.zeros((3, max(16, len(tokens))), np.int32)
        self._entries[TOKEN, : len(tokens)] = tokens
        self._entries[BEFORE, : len(tokens)] = _bits([bias.get(token, 0.0) for token in tokens])
        self._matcher = matcher
        self._seen = np.zeros(-(-vocab_size // 32), np.uint32)
        if adjustment.repetition_penalty != 1:
            bit, word = np.divmod(np.unique(np.frombuffer(command.prompt, "<i4")), len(self._seen))
            np.bitwise_or.at(self._seen, word, np.left_shift(np.uint32(1), bit.astype(np.uint32)))

    @property
    def num_entries(self) -> int:
        return len(self._index)

    def observe(self, position: int, token: int) -> None:
        """`token` is the newest one of the text, at `position`. Telling it again changes nothing."""
        if not self.adjustment.needs_history or position < self._num_counted:
            return
        assert position == self._num_counted, f"token {position} is told before token {self._num_counted}"
        self._num_counted = position + 1
        if self.adjustment.repetition_penalty != 1:
            bit, word = divmod(token, len(self._seen))
            self._seen[word] |= np.uint32(1 << bit)
        if self.adjustment.counts_output:
            self._count(token)
        if self._matcher is not None:
            self._matcher.take(token)

    def _count(self, token: int) -> None:
        count = self._counts[token] = self._counts.get(token, 0) + 1
        index = self._index.setdefault(token, len(self._index))
        if index == self._entries.shape[1]:
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)], axis=1)
        penalty = self.adjustment.presence_penalty + self.adjustment.frequency_penalty * count
        self._entries[TOKEN, index] = token
        self._entries[AFTER, index] = _bits(-penalty)

    def write(self, fields: dict[str, np.ndarray], at: tuple[int, ...], position: int) -> None:
        """Fill row `at` of the fields of `adjust_layout`, to sample the token at `position`."""
        num_entries = len(self._index)
        fields["num_entries"][at] = num_entries
        entries = fields["entries"][at]
        entries[:, :num_entries] = self._entries[:, :num_entries]
        if self._banned and position - self._num_prompt < self.adjustment.min_tokens:
            entries[BEFORE, : len(self._banned)] = _bits(BAN)
        if self.adjustment.repetition_penalty != 1:
            fields["repetition"][at] = _bits(self.adjustment.repetition_penalty)
            fields["seen"][at] = self._seen.view(np.int32)
        allowed = None if self._matcher is None else self._matcher.allowed()
        if allowed is not None:
            fields["constrained"][at] = 1
            fields["allowed"][at] = _striped(allowed, len(self._seen))


def _striped(words: np.ndarray, num_words: int) -> np.ndarray:
    """Token t from bit t % 32 of word t // 32 to bit t // words of word t % words, where its row unpacks fast."""
    bits = np.unpackbits(words[:num_words].view(np.uint8), bitorder="little")
    stripes = np.packbits(bits.reshape(4, 8, num_words), axis=1, bitorder="little")[:, 0]
    return np.ascontiguousarray(stripes.T).view("<i4")[:, 0]


def _bits(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.int32)
