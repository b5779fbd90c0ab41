"""Prose: the same every time, and nothing of what the model is measured on is in what it was trained on."""

import random

from needle import text


def test_held_out_paragraphs_are_not_trained_on():
    train, held_out = text.documentation("train"), text.documentation("held_out")
    assert len(train) > 5 * len(held_out) > 200
    assert not set(train) & set(held_out)
    assert all(len(paragraph) >= 80 and paragraph.isascii() and "\n" not in paragraph for paragraph in train)


def test_sentences_follow_from_the_seed_and_use_words_of_keys():
    first, again = (text.paragraph(random.Random(3)) for _ in range(2))
    assert first == again
    words = set(" ".join(text.sentence(random.Random(i)) for i in range(2000)).replace(".", " ").split())
    assert len(words & set(text.NOUNS)) > 80
    assert len(words & set(text.ADJECTIVES)) > 70
    assert not set(text.NOUNS) & set(text.ADJECTIVES)
