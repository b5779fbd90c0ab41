"""Training sequences: facts among prose, questions after them, and positions that reach as far as the model shall.

A short sequence stands for a long one in two ways. Its chunks lie at positions far apart (PoSE, arXiv:2309.10400: gaps
between chunks, none within), and its far-away prose counts as many copies of itself: the logarithm of a `multiplicity`
is added to attention logits, in training only, so that the softmax sees as many other keys as in a long context.
What it is not: the model (`model.py`); text (`text.py`, `facts.py`).
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from needle.facts import KINDS, PASS_KEY, Fact, Kind, near_miss, random_key, random_value
from needle.tokens import BOS_ID, Corpus, Tokens

PROSE, ASKED, DECOY = 0, 1, 2
"""What a token belongs to; `ASKED` also covers the questions and BOS."""

_FIRST_DIGIT_WEIGHT, _DIGIT_WEIGHT = 10.0, 8.0  # of an answer: the first is found by the key alone
_PROSE_WEIGHT, _QUESTION_WEIGHT = 0.5, 0.1
_TOKENS_PER_FACT = 28  # at most one fact that is asked for in so many tokens
_TOKENS_PER_STATEMENT = 12  # of a drill
_DIGITS = (3, 4, 5, 5, 5, 5, 6, 7)  # of the values in other sequences
_MIN_PROSE = 8
_SHARED_FIRST = 0.7  # of those, the first word: the second is learned sooner
_DOCUMENTATION = 0.4  # of the stretches of prose; the others are generated
_CHUNKS = (0, 1, 2, 4, 8, 16)  # gaps between chunks


class Sample(NamedTuple):
    """One sequence, or a batch with a leading axis; all [length]."""

    ids: np.ndarray  # int32
    weights: np.ndarray  # float32, of the loss of predicting this token
    kinds: np.ndarray  # int32: PROSE, ASKED or DECOY
    chunks: np.ndarray  # int32, counting up
    positions: np.ndarray  # int32


class Content(NamedTuple):
    """What sequences are made of. `drills`: their share, and how many digits the values in them may have;
    `near_misses`: share of keys that have a word in common with another key of the sequence; `same_start`: share of
    those whose value begins as the other's, so that later digits need the key, too."""

    length: int
    drills: float
    drill_digits: tuple[int, ...]
    near_misses: float
    same_start: float


class _Segment(NamedTuple):
    ids: list[int]
    weights: list[float]
    kind: int


def batch(
    rng: random.Random, tokens: Tokens, corpora: Sequence[Corpus], content: Content, size: int, reach: int
) -> Sample:
    """`size` sequences at positions below `reach`."""
    rows = [sequence(rng, tokens, corpora, content, reach) for _ in range(size)]
    return Sample(*(np.stack(parts) for parts in zip(*rows, strict=True)))


def sequence(rng: random.Random, tokens: Tokens, corpora: Sequence[Corpus], content: Content, reach: int) -> Sample:
    while True:
        segments = _segments(rng, tokens, corpora, content)
        if segments is not None:
            break
    gaps = _gaps(rng, len(segments), reach - content.length - 1)
    ids, weights, kinds, chunks, positions = [BOS_ID], [0.0], [ASKED], [0], [0]
    for segment, gap in zip(segments, gaps, strict=True):
        count = len(segment.ids)
        start = positions[-1] + 1 + gap
        ids += segment.ids
        weights += segment.weights
        kinds += [segment.kind] * count
        chunks += [chunks[-1] + (gap > 0)] * count
        positions += range(start, start + count)
    as_ints = lambda values: np.array(values, np.int32)
    return Sample(as_ints(ids), np.array(weights, np.float32), as_ints(kinds), as_ints(chunks), as_ints(positions))


def _segments(rng: random.Random, tokens: Tokens, corpora: Sequence[Corpus], content: Content) -> list[_Segment] | None:
    """The facts' parts with prose between; None when they do not fit."""
    drill = rng.random() < content.drills
    parts = _drill(rng, tokens, content) if drill else _questions(rng, tokens, content)
    room = content.length - 1 - sum(len(part.ids) for part in parts)
    if room < _MIN_PROSE:
        return None
    cuts = [0, *sorted(rng.randrange(room + 1) for _ in parts), room]
    segments = []
    for (begin, end), part in zip(pairwise(cuts), [*parts, None], strict=True):
        if end > begin:
            segments.append(_prose(rng, corpora, end - begin))
        if part is not None:
            segments.append(part)
    return segments


def _drill(rng: random.Random, tokens: Tokens, content: Content) -> list[_Segment]:
    """Facts said again and again: every time but the first is a question, and the tersest one. Three
    layers without them learned to copy digits long before they told keys apart; four layers learn keys from questions
    alone, and sooner."""
    count = content.length // _TOKENS_PER_STATEMENT
    facts = _facts(rng, rng.randint(2, max(2, count // 2)), content.drill_digits, content)
    order = [*range(len(facts)), *(rng.randrange(len(facts)) for _ in range(count - len(facts)))]
    rng.shuffle(order)
    said: set[int] = set()
    parts = []
    for i in order:
        kind = ASKED if order.count(i) > 1 else DECOY
        parts.append(_fact(tokens, facts[i], kind, known=i in said))
        said.add(i)
    return parts


def _questions(rng: random.Random, tokens: Tokens, content: Content) -> list[_Segment]:
    """Facts in any order, each question somewhere after its fact."""
    facts = _facts(rng, rng.randint(2, max(2, content.length // _TOKENS_PER_FACT)), _DIGITS, content)
    asked = rng.sample(range(len(facts)), rng.randint(max(1, len(facts) // 2), len(facts)))
    order: list[tuple[bool, int]] = [(False, i) for i in range(len(facts))]
    rng.shuffle(order)
    for i in asked:
        after = order.index((False, i)) + 1
        order.insert(len(order) if rng.random() < 0.5 else rng.randint(after, len(order)), (True, i))
    return [
        _question(tokens, facts[i])
        if question
        else _fact(tokens, facts[i], ASKED if i in asked else DECOY, known=False)
        for question, i in order
    ]


def _facts(rng: random.Random, count: int, digits: Sequence[int], content: Content) -> list[Fact]:
    facts: list[Fact] = []
    used: set[tuple[str, str]] = set()
    for _ in range(count):
        kind: Kind = rng.choice(KINDS)
        value = random_value(rng, rng.choice(digits))
        if kind == "pass_key" and PASS_KEY not in used and rng.random() < 0.7:
            key = PASS_KEY
        elif facts and rng.random() < content.near_misses:
            # Often of the first key: then many keys share a word, as many decoys of one question do.
            other = facts[0] if rng.random() < 0.5 else rng.choice(facts)
            key = near_miss(rng, other.key, used, _SHARED_FIRST)
            kind = other.kind if rng.random() < 0.6 else kind
            if rng.random() < content.same_start:
                value = other.value[0] + value[1:]
        else:
            key = random_key(rng, used)
        used.add(key)
        repeated = kind == "pass_key" and digits is _DIGITS and rng.random() < 0.5
        facts.append(Fact(kind, key, value, repeated))
    return facts


def _fact(tokens: Tokens, fact: Fact, kind: int, known: bool) -> _Segment:
    """A value at its first appearance cannot be `known`: no loss."""
    before, value, after = (list(tokens.encode(part)) for part in fact.parts)
    answer = _answer_weights(value) if known else [0.0] * len(value)
    weights = [_QUESTION_WEIGHT] * len(before) + answer + [1.0] * len(after)
    return _Segment(before + value + after, weights, kind)


def _answer_weights(value: Sequence[int]) -> list[float]:
    return [_FIRST_DIGIT_WEIGHT, *[_DIGIT_WEIGHT] * (len(value) - 1)]


def _question(tokens: Tokens, fact: Fact) -> _Segment:
    question, value = list(tokens.encode(fact.question)), list(tokens.encode(f" {fact.value}"))
    weights = [_QUESTION_WEIGHT] * len(question) + _answer_weights(value) + [1.0]
    return _Segment(question + value + list(tokens.encode(".")), weights, ASKED)


def _prose(rng: random.Random, corpora: Sequence[Corpus], length: int) -> _Segment:
    corpus = corpora[0] if rng.random() < _DOCUMENTATION else corpora[1]
    start = int(corpus.starts[rng.randrange(len(corpus.starts))])
    if rng.random() < 0.3:
        start += rng.randrange(60)
    start = max(0, min(start, len(corpus.ids) - length))
    return _Segment(corpus.ids[start : start + length].tolist(), [_PROSE_WEIGHT] * length, PROSE)


def _gaps(rng: random.Random, num_segments: int, budget: int) -> list[int]:
    """Positions left out before each segment: a few gaps, together uniform or log-uniform up to the budget."""
    gaps = [0] * num_segments
    places = [rng.randrange(num_segments) for _ in range(rng.choice(_CHUNKS))]
    total = int(budget * (rng.random() if rng.random() < 0.6 else 10 ** (-3 * rng.random())))
    shares = [rng.random() ** 2 + 1e-3 for _ in places]
    for place, share in zip(places, shares, strict=True):
        gaps[place] += int(total * share / sum(shares))
    return gaps
