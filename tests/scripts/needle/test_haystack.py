"""Documents: where facts stand, how many decoys nearly match, and lengths by any tokenizer."""

import random

import pytest
from needle import haystack
from needle.facts import KINDS
from needle.haystack import Haystack, Placed

PROSE = haystack.sentences(random.Random(0), 4000)


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_stands_at_its_depth_between_sentences(kind, depth):
    fact = haystack.random_fact(random.Random(1), kind)
    document = Haystack(PROSE, [Placed(fact, depth)]).document(400)
    before, after = document.split(fact.text)
    assert after == "".join(f" {sentence}" for sentence in PROSE[round(depth * 400) : 400])
    assert before == "".join(f" {sentence}" for sentence in PROSE[: round(depth * 400)])


def test_fit_takes_as_many_sentences_as_fit():
    fact = haystack.random_fact(random.Random(1), "pair")
    made = haystack.fit(Haystack(PROSE, [Placed(fact, 0.5)]), fact.question, 900, count)
    assert 900 - 60 < count(made) <= 900
    assert made.endswith(fact.question)
    assert fact.text in made
    with pytest.raises(ValueError, match="5 tokens are too few"):
        haystack.fit(Haystack(PROSE, [Placed(fact, 0.5)]), fact.question, 5, count)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_decoys_nearly_match_and_none_does(kind):
    fact = haystack.random_fact(random.Random(2), kind)
    placed = haystack.decoys(random.Random(3), [fact], 20)
    near = [p.fact for p in placed if (p.fact.key[0] == fact.key[0]) or (p.fact.key[1] == fact.key[1])]
    assert len(placed) == 20
    assert 10 <= len(near) <= 12  # another may share a word by chance
    assert sum(p.fact.kind == fact.kind for p in placed) >= 10
    assert fact.key not in {p.fact.key for p in placed}
    depths = [p.depth for p in placed]
    assert depths == sorted(depths)
    assert max(b - a for a, b in zip(depths, depths[1:], strict=False)) <= 0.1


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 48213.", True),
        ("48213", True),
        (" 48213. The sky", True),
        (" 482137", False),
        (" 48214", False),
        ("", False),
        (" 4821", False),
        ("x48213", False),
    ],
)
def test_an_answer_is_the_whole_value(answer, right):
    assert haystack.is_right(answer, "48213") == right


def test_prose_is_enough_and_follows_from_the_seed():
    assert haystack.sentences(random.Random(0), 4000) == PROSE
    assert len(" ".join(PROSE)) >= 8 * 4000
    assert set(haystack.sentences(random.Random(0), 100, "classic")) == set(haystack.CLASSIC)
