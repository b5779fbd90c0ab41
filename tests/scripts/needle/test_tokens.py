"""The tokenizer and the prose as tokens: made once, found again."""

import numpy as np
from needle import tokens


def test_prepare_makes_the_prose_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_GENERATED_PARAGRAPHS", 200)
    monkeypatch.setattr(tokens, "_TOKENIZER_PARAGRAPHS", 100)
    monkeypatch.setattr(tokens.text, "documentation", lambda split: [f"The {split} text says nothing. " * 5] * 50)
    first, corpora = tokens.prepare(tmp_path, 0)
    assert len(first.encode(" The garden is red.")) == 5
    assert [len(first.encode(f" {digit}071")) for digit in range(10)] == [4] * 10
    ids = first.tokenizer.encode("Elastic — 弹性 \n\t sequence").ids
    assert ids[0] == tokens.BOS_ID
    assert first.tokenizer.decode(ids) == "Elastic — 弹性 \n\t sequence"
    starts = corpora[1].starts
    assert len(starts) == 200
    assert first.tokenizer.decode(corpora[0].ids[: corpora[0].starts[1]].tolist()).startswith(" The train text")

    monkeypatch.setattr(tokens, "train_tokenizer", None)
    again, same = tokens.prepare(tmp_path, 0)
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    np.testing.assert_array_equal(same[0].ids, corpora[0].ids)
