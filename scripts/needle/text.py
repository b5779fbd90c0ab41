"""The prose needles hide in: generated sentences, and paragraphs of the documentation that comes with Python.

Nothing is downloaded. Paragraphs are split into "train" and "held_out" by a checksum of their text, so that the model
is measured on prose it was not trained on. What it is not: facts and questions (`facts.py`), tokens (`tokens.py`).
"""

import ast
import importlib
import random
import re
import sysconfig
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

# Words of keys and answers. They also fill the sentences, so a word of a key by itself says nothing.
ADJECTIVES = (
    "red blue green old new big small cold warm dark bright quiet loud happy sad quick slow late heavy light strong "
    "weak rich poor clean dirty dry wet deep flat soft hard sharp round square young local foreign public private "
    "royal common rare simple strange golden silver wooden iron copper northern southern eastern western upper lower "
    "inner outer first second last main secret hidden open closed lost broken empty full lucky magic famous gentle "
    "brave calm wild fresh sweet bitter plain fancy tall short long wide narrow thick thin"
).split()
NOUNS = (
    "key code number house garden river mountain door window table letter book road bridge ship train market school "
    "castle tower forest island station village city king queen doctor teacher farmer soldier driver baker painter "
    "singer writer bird horse dog cat fish wolf bear lion apple orange lemon bread butter cheese coffee sugar salt "
    "water stone metal paper glass clock lamp chair box bag coat hat shoe ring coin stamp ticket card map flag drum "
    "bell piano song story poem game prize lesson plan report order room office kitchen field valley lake engine "
    "wheel rope candle"
).split()
VERBS = "saw found lost carried painted opened closed bought sold fixed watched followed liked missed needed".split()
ADVERBS = "slowly quickly quietly again today yesterday early late together alone often".split()
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Jack Kate Leo Mary Noah Peter Rose Sam Tom Wendy".split()
PREPOSITIONS = "near behind under beside above inside outside past".split()
CLASSIC: tuple[str, ...] = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""The repeated lines of the usual pass-key test."""

_MIN_DOCSTRING_CHARS = 150
_MIN_PARAGRAPH_CHARS = 80
_MIN_LETTERS = 0.74  # of a paragraph's characters: keeps tables and code out
_HELD_OUT_ONE_IN = 16
_SENTENCES_PER_PARAGRAPH = 8


def sentence(rng: random.Random) -> str:
    """One generated sentence."""
    a, b = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
    m, n = rng.choice(NOUNS), rng.choice(NOUNS)
    name = rng.choice(NAMES)
    kind = rng.random()
    if kind < 0.22:
        return f"The {a} {m} was {rng.choice(PREPOSITIONS)} the {b} {n}."
    if kind < 0.44:
        return f"{name} {rng.choice(VERBS)} the {a} {m} {rng.choice(ADVERBS)}."
    if kind < 0.60:
        return f"{name} and {rng.choice(NAMES)} {rng.choice(VERBS)} a {m} and a {b} {n}."
    if kind < 0.70:
        return f"When the {m} was {a}, {name} {rng.choice(VERBS)} the {n}."
    if kind < 0.78:
        return rng.choice(CLASSIC)
    if kind < 0.86:
        return f"In {rng.randint(1000, 2100)} there were {rng.randint(2, 99999)} {a} {m}s in the {n}."
    if kind < 0.93:
        return f"The {m} is {a} and the {n} is {b}."
    return f"Why was the {m} so {a}? Nobody knows, said {name}."


def paragraph(rng: random.Random) -> str:
    """Some generated sentences."""
    return " ".join(sentence(rng) for _ in range(_SENTENCES_PER_PARAGRAPH))


def documentation(split: Split) -> list[str]:
    """Paragraphs of the interpreter's help topics and of the docstrings of its standard library, in a fixed order."""
    held_out = split == "held_out"
    return [text for text in _paragraphs() if (zlib.crc32(text.encode()) % _HELD_OUT_ONE_IN == 0) == held_out]


@cache
def _paragraphs() -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in [*_help_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))]:
        for part in re.split(r"\n\s*\n", text):
            clean = re.sub(r"[*\"`]", "", " ".join(part.split()))
            if _is_prose(clean):
                found[clean] = None
    return tuple(found)


def _help_topics() -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def _docstrings(library: Path) -> list[str]:
    """Of the modules at most two folders deep, without tests and what was installed beside them."""
    found = []
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        if "test" in path.name or path.parent.name in {"site-packages", "dist-packages", "test", "tests"}:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _MIN_DOCSTRING_CHARS:
                    found.append(text)
    return found


def _is_prose(text: str) -> bool:
    if len(text) < _MIN_PARAGRAPH_CHARS or any(sign in text for sign in (">>>", "::=", "|  ")):
        return False
    return text.isascii() and sum(c.isalpha() for c in text) >= _MIN_LETTERS * len(text)
