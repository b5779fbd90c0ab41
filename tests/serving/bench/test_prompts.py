"""Data sets: lengths, seeds, files that are not what they should be."""

import json
import random

import pytest

from loong_jax.config import ConfigError
from loong_jax.default_model import DEFAULT_MODEL
from serving.bench import prompts
from serving.bench.prompts import Span
from serving.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEFAULT_MODEL)


def test_random_prompts_have_their_lengths_and_share_their_prefix(tokenizer):
    items = prompts.random_items(tokenizer, 50, 7, Span(100, 0.5), Span(10), 8)
    assert items == prompts.random_items(tokenizer, 50, 7, Span(100, 0.5), Span(10), 8)
    assert items != prompts.random_items(tokenizer, 50, 8, Span(100, 0.5), Span(10), 8)
    assert len({item.prompt[:8] for item in items}) == 1
    assert {item.max_tokens for item in items} == {10}
    lengths = [len(item.prompt) - 8 for item in items]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 20
    assert all(item.num_prompt_tokens == len(item.prompt) for item in items)
    assert all(tokenizer.has_text(token) for item in items for token in item.prompt)


def test_a_span_never_draws_nothing():
    assert {Span(1, 0.9).draw(random.Random(i)) for i in range(50)} <= {1, 2}


def test_sharegpt_takes_first_turns_of_fitting_lengths(tokenizer, tmp_path):
    turn = lambda text: {"from": "x", "value": text}
    long = "The river lies behind the garden. " * 400
    entries = [
        {"conversations": [turn("Tell me about the old house."), turn("The old house lies behind the river.")]},
        {"conversations": [turn(long), turn("Yes, it does, as everybody knows.")]},
        {"conversations": [turn("alone, without an answer")]},
        {"id": "nothing"},
        7,
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    items = prompts.sharegpt_items(path, tokenizer, 3, 0, None)
    assert [item.prompt for item in items] == ["Tell me about the old house."] * 3
    assert items[0].max_tokens == len(tokenizer.encode("The old house lies behind the river."))
    assert prompts.sharegpt_items(path, tokenizer, 1, 0, 9)[0].max_tokens == 9


@pytest.mark.parametrize("content", ["{", "{}", "[]", '[{"conversations": []}]', "[3]"])
def test_sharegpt_refuses_other_files(content, tokenizer, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="dataset-path: "):
        prompts.sharegpt_items(path, tokenizer, 1, 0, None)


def test_custom_lines(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a road", "answer": "b"}\n{"prompt": [5, 6], "output_tokens": 3}\n')
    text, ids, again = prompts.custom_items(path, tokenizer, 3, 20)
    assert (text.prompt, text.max_tokens, text.answer) == ("a road", 20, "b")
    assert (ids.prompt, ids.max_tokens, ids.num_prompt_tokens, ids.answer) == ((5, 6), 3, 2, None)
    assert again == text


@pytest.mark.parametrize(
    "line", ["", "nothing", "[]", '{"prompt": 3}', '{"prompt": ""}', '{"prompt": "a", "output_tokens": 0}',
             '{"prompt": "a", "output_tokens": true}', '{"prompt": "a", "answer": 1}', '{"prompt": [1, "b"]}']
)  # fmt: skip
def test_custom_lines_are_refused_by_their_number(line, tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        prompts.custom_items(path, tokenizer, 5, 20)


def test_sonnets_share_a_prefix_and_fit(tokenizer, tmp_path):
    items = prompts.sonnet_items(None, tokenizer, 5, 3, 300, 20, 100)
    assert len({item.prompt for item in items}) == 5
    shared = items[0].prompt[:200]
    assert all(item.prompt.startswith(shared) for item in items)
    assert all(250 <= item.num_prompt_tokens <= 305 for item in items), [item.num_prompt_tokens for item in items]
    path = tmp_path / "lines"
    path.write_text("one line\nanother line\n")
    assert "another line" in prompts.sonnet_items(path, tokenizer, 1, 3, 30, 20, 0)[0].prompt
    with pytest.raises(ConfigError, match="sonnet-prefix-len"):
        prompts.sonnet_items(None, tokenizer, 1, 3, 100, 20, 100)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no line"):
        prompts.sonnet_items(path, tokenizer, 1, 3, 30, 20, 0)


def test_needles_are_asked_for_and_hidden(tokenizer):
    items = prompts.needle_items(tokenizer, 6, 1, (200, 800), 8)
    assert [item.num_prompt_tokens > 400 for item in items] == [False, True] * 3
    for item in items:
        assert item.prompt.count(item.answer) == 1
        assert item.prompt.endswith("The pass key is")
        assert 0.8 < item.num_prompt_tokens / (800 if item.num_prompt_tokens > 400 else 200) < 1.05
    with pytest.raises(ConfigError, match="needle-input-len"):
        prompts.needle_items(tokenizer, 1, 1, (5,), 8)
