"""Needles: facts of three kinds, the questions about them, and keys that nearly match.

    pass key     The pass key is 48213. Remember it. 48213 is the pass key.
    pair         Store red garden = 48213.
    line         Line red garden: 48213.

Every text begins and ends where a pre-token does, so tokens of parts joined are the tokens of the joined text.
What it is not: the prose around them (`text.py`).
"""

import random
from collections.abc import Collection
from typing import Literal, NamedTuple

from needle.text import ADJECTIVES, NOUNS

Kind = Literal["pass_key", "pair", "line"]
KINDS: tuple[Kind, ...] = ("pass_key", "pair", "line")
PASS_KEY = ("pass", "key")
NUM_DIGITS = 5


class Fact(NamedTuple):
    """`key`: two words. `value`: without the space before it. `repeated`: a pass key said twice."""

    kind: Kind
    key: tuple[str, str]
    value: str
    repeated: bool = False

    @property
    def parts(self) -> tuple[str, str, str]:
        """Text up to the value, the value with the space before it, the rest."""
        key, value = " ".join(self.key), f" {self.value}"
        if self.kind == "pair":
            return f" Store {key} =", value, "."
        if self.kind == "line":
            return f"\nLine {key}:", value, ".\n"
        rest = f". Remember it.{value} is the {key}." if self.repeated else "."
        return f" The {key} is", value, rest

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def question(self) -> str:
        """The prompt's end; what follows is `answer`."""
        key = " ".join(self.key)
        if self.kind == "pair":
            return f"\nWhat is {key}? Store {key} ="
        if self.kind == "line":
            return f"\nWhat does line {key} say?\nLine {key}:"
        return f"\nWhat is the {key}? The {key} is"

    @property
    def answer(self) -> str:
        return f" {self.value}."


def random_value(rng: random.Random, num_digits: int = NUM_DIGITS) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(num_digits))


def random_key(rng: random.Random, used: Collection[tuple[str, str]]) -> tuple[str, str]:
    """A key that is not in use."""
    while True:
        key = (rng.choice(ADJECTIVES), rng.choice(NOUNS))
        if key not in used:
            return key


def near_miss(
    rng: random.Random, key: tuple[str, str], used: Collection[tuple[str, str]], first: float = 0.5
) -> tuple[str, str]:
    """A key that is not in use and shares one word with `key`: the first one, with this probability, or the second."""
    while True:
        other = (key[0], rng.choice(NOUNS)) if rng.random() < first else (rng.choice(ADJECTIVES), key[1])
        if other != key and other not in used:
            return other
