"""Long documents with facts in them, as text: prose the model was not trained on, a fact at a depth, and decoys.

What it is not: anything about tokens; how long a text is, the caller's tokenizer says (`fit`).
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from needle.facts import KINDS, PASS_KEY, Fact, Kind, near_miss, random_key, random_value
from needle.text import CLASSIC, documentation, paragraph

Prose = Literal["mixed", "classic"]

_DOCUMENTATION = 0.5  # of the paragraphs of mixed prose; the others are generated
_NEAR_MISSES = 0.5  # of the decoys
_MAX_SENTENCE_CHARS = 300  # what has no full stop for longer is no sentence, and lengths are cut at sentences
_CHARS_PER_TOKEN = 8  # more than any tokenizer makes of prose: enough sentences to cut from


class Placed(NamedTuple):
    """A fact and where it stands: 0 is the document's beginning, 1 its end."""

    fact: Fact
    depth: float


class Haystack(NamedTuple):
    """Sentences of prose, as many as are wanted or more, and the facts among them."""

    sentences: Sequence[str]
    facts: Sequence[Placed]

    def document(self, num_sentences: int) -> str:
        """The text with so many of the sentences. Facts stand between sentences."""
        before: dict[int, list[str]] = {}
        for fact, depth in self.facts:
            before.setdefault(round(depth * num_sentences), []).append(fact.text)
        parts = []
        for i in range(num_sentences + 1):
            parts += before.get(i, [])
            if i < num_sentences:
                parts.append(f" {self.sentences[i]}")
        return "".join(parts)


def sentences(rng: random.Random, num_tokens: int, prose: Prose = "mixed") -> list[str]:
    """More sentences than `num_tokens` tokens hold."""
    num_chars = num_tokens * _CHARS_PER_TOKEN
    if prose == "classic":
        return [*CLASSIC] * (num_chars // len(" ".join(CLASSIC)) + 1)
    written = documentation("held_out")
    found: list[str] = []
    while num_chars > 0:
        text = rng.choice(written) if rng.random() < _DOCUMENTATION else paragraph(rng)
        parts = [part for part in re.split(r"(?<=[.!?]) +", text) if len(part) <= _MAX_SENTENCE_CHARS]
        found += parts
        num_chars -= sum(map(len, parts))
    return found


def random_fact(rng: random.Random, kind: Kind) -> Fact:
    """A fact to ask for. The pass key's name is always the same; a pair's and a line's are drawn."""
    key = PASS_KEY if kind == "pass_key" else random_key(rng, ())
    return Fact(kind, key, random_value(rng), repeated=kind == "pass_key")


def decoys(rng: random.Random, asked: Sequence[Fact], count: int) -> list[Placed]:
    """Facts nobody asks for, spread over the document: half share kind and one word with a fact that is asked for."""
    used = {fact.key for fact in asked}
    placed = []
    for i in range(count):
        target = rng.choice(asked)
        near = (i + 0.5) * _NEAR_MISSES % 1 < _NEAR_MISSES
        kind = target.kind if near else rng.choice(KINDS)
        key = near_miss(rng, target.key, used) if near else random_key(rng, used)
        used.add(key)
        placed.append(Placed(Fact(kind, key, random_value(rng)), (i + rng.random()) / count))
    return placed


def fit(haystack: Haystack, end: str, num_tokens: int, count: Callable[[str], int]) -> str:
    """The longest document that, with `end` after it, has at most `num_tokens` tokens by `count`.

    Raises ValueError when not even the facts fit.
    """
    low, high = 0, len(haystack.sentences)
    if count(haystack.document(0) + end) > num_tokens:
        raise ValueError(f"{num_tokens} tokens are too few for the facts and the question")
    while high - low > 1:
        middle = (low + high) // 2
        if count(haystack.document(middle) + end) <= num_tokens:
            low = middle
        else:
            high = middle
    return haystack.document(low) + end


def is_right(answer: str, value: str) -> bool:
    """The answer begins with the value, and what follows is no more of it."""
    text = answer.strip()
    return text.startswith(value) and not text[len(value) : len(value) + 1].isalnum()
