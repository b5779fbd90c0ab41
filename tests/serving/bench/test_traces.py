"""Trace files become requests: which lengths, which times, which tokens are shared."""

import json

import pytest

from loong_jax.config import ConfigError
from loong_jax.default_model import DEFAULT_MODEL
from serving.bench.traces import trace_items
from serving.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEFAULT_MODEL)


def test_blocks_of_the_same_hash_are_the_same_tokens(tokenizer, tmp_path):
    path = tmp_path / "conversation.jsonl"
    rows = [
        {"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 900, "output_length": 0, "hash_ids": [0, 2]},
        {"timestamp": 3500, "input_length": 90_000, "output_length": 1, "hash_ids": list(range(200))},
        {"timestamp": 4000, "input_length": 30, "output_length": 2, "hash_ids": [1]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = trace_items(path, tokenizer, 3, 0, max_total_tokens=1000)
    assert [len(item.prompt) for item in (first, second, third)] == [700, 900, 30]
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:700] != second.prompt[512:700]
    assert third.prompt == first.prompt[512:542]
    assert [item.arrival_s for item in (first, second, third)] == [0.0, 1.0, 2.0]
    assert [item.max_tokens for item in (first, second, third)] == [5, 1, 2]
    half = trace_items(path, tokenizer, 2, 0, length_scale=0.5)
    assert [item.num_prompt_tokens for item in half] == [350, 450]
    assert half[0].prompt[:256] == half[1].prompt[:256]
    with pytest.raises(ConfigError, match="num-prompts"):
        trace_items(path, tokenizer, 5, 0)
    with pytest.raises(ConfigError, match="no request"):
        trace_items(path, tokenizer, 1, 0, max_total_tokens=5)


def test_lengths_without_times(tokenizer, tmp_path):
    path = tmp_path / "any-name.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n37,5\n")
    (item,) = trace_items(path, tokenizer, 1, 0)
    assert (len(item.prompt), item.max_tokens, item.arrival_s) == (37, 5, None)
    with pytest.raises(OSError, match="nowhere"):
        trace_items(tmp_path / "nowhere", tokenizer, 1, 0)
