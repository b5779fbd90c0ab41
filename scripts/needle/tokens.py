"""The tokenizer, and the prose as arrays of tokens. Made once for a training run and kept in its folder.

What it is not: the layout of training sequences (`sequences.py`).
"""

import random
import string
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from needle import text
from needle.facts import KINDS, PASS_KEY, Fact, random_key, random_value
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 1024
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# A word or a digit with the space before it is one unit, a further digit another: numbers are copied digit by digit.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_GENERATED_PARAGRAPHS = 16_000
_TOKENIZER_PARAGRAPHS = 3_000


class Corpus(NamedTuple):
    """Tokens of paragraphs one after another, each begun with a space, and where each begins."""

    ids: np.ndarray  # int32 [tokens]
    starts: np.ndarray  # int64 [paragraphs]


class Tokens:
    """A tokenizer with a memory: the parts of facts and questions come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, piece: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(piece, add_special_tokens=False).ids)


def train_tokenizer(paragraphs: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; encoding a text puts BOS before it. Every word of `text` with its space is one token, and so is
    every digit: were some digits two, the first token of a value would often say nothing about it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return tokenizer


def prepare(folder: Path, seed: int) -> tuple[Tokens, tuple[Corpus, Corpus]]:
    """The tokenizer and the training prose (documentation, generated), from `folder` where they are there already."""
    path, data = folder / "tokenizer.json", folder / "corpus.npz"
    if not data.exists():
        rng = random.Random(seed)
        documentation = text.documentation("train")
        rng.shuffle(documentation)
        generated = [text.paragraph(rng) for _ in range(_GENERATED_PARAGRAPHS)]
        tokenizer = train_tokenizer([*documentation, *generated[:_TOKENIZER_PARAGRAPHS], *_fact_lines(rng)])
        tokenizer.save(str(path))
        arrays = {}
        for name, paragraphs in (("documentation", documentation), ("generated", generated)):
            encoded = tokenizer.encode_batch([f" {part}" for part in paragraphs], add_special_tokens=False)
            lengths = [len(part.ids) for part in encoded]
            arrays[name] = np.concatenate([np.array(part.ids, np.int32) for part in encoded])
            arrays[f"{name}_starts"] = np.cumsum([0, *lengths[:-1]])
        np.savez(data, **arrays)
    with np.load(data) as arrays:
        corpora = (
            Corpus(arrays["documentation"], arrays["documentation_starts"]),
            Corpus(arrays["generated"], arrays["generated_starts"]),
        )
    return Tokens(Tokenizer.from_file(str(path))), corpora


def _fact_lines(rng: random.Random) -> list[str]:
    """Enough of each word and digit after a space, and of the questions' own words, that BPE makes each one token."""
    lines = [f" {word}" for word in (*text.ADJECTIVES, *text.NOUNS, *string.digits) for _ in range(300)]
    for _ in range(600):
        for kind in KINDS:
            key = PASS_KEY if kind == "pass_key" else random_key(rng, ())
            fact = Fact(kind, key, random_value(rng), repeated=kind == "pass_key")
            lines += [fact.text, fact.question]
    return lines
