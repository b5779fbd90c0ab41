"""The two shapes of log-probabilities."""

import math

from serving.http import logprobs
from serving.http.logprobs import Scored, TokenNames
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.byte_tokenizer import EOS, byte_tokenizer

NAMES = TokenNames(byte_tokenizer(), as_ids=False)
A, B, HALF = ord("a"), ord("b"), 0xC3


def test_tables_hold_the_token_itself_to_the_last_bit_and_offsets_go_on():
    tokens = [Scored(A, None), Scored(B, -0.5, [A, B], [-0.25, -0.5000001]), Scored(EOS, -3.0, [A], [-0.125])]
    table, offset = logprobs.tables(tokens, NAMES, 7)
    assert table == {
        "tokens": ["a", "b", "</s>"],
        "token_logprobs": [None, -0.5, -3.0],
        "top_logprobs": [None, {"a": -0.25, "b": -0.5}, {"a": -0.125, "</s>": -3.0}],
        "text_offset": [7, 8, 9],
    }
    assert offset == 13


def test_of_several_tokens_with_one_name_the_likeliest_stands():
    table, _ = logprobs.tables([Scored(0xC4, -2.0, [HALF, A], [-0.5, -1.0])], NAMES, 0)
    assert table["top_logprobs"] == [{"\ufffd": -0.5, "a": -1.0}]


def test_chat_has_bytes_where_they_are_known():
    content = logprobs.chat_content([Scored(A, -0.5, [HALF], [-math.inf])], NAMES)
    top = [{"token": "\ufffd", "logprob": -9999.0, "bytes": None}]
    assert content == [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}]


def test_prompt_scores_come_in_parts():
    parts = [
        pb.PromptLogprobs(first=1, logprobs=[-1], num_top=2, top_token_ids=[5, 6], top_logprobs=[-1, -2]),
        pb.PromptLogprobs(first=2, logprobs=[-3], num_top=2, top_token_ids=[7, 8], top_logprobs=[-2, -4]),
    ]
    scored = logprobs.of_prompt([4, 5, 6], parts)
    assert [(it.token_id, it.logprob, list(it.top_ids)) for it in scored] == [
        (4, None, []),
        (5, -1.0, [5, 6]),
        (6, -3.0, [7, 8]),
    ]


def test_tokens_by_number_where_asked_for_and_where_there_is_no_tokenizer():
    assert TokenNames(byte_tokenizer(), as_ids=True)[A] == "token_id:97"
    assert TokenNames(None, as_ids=False)[A] == "token_id:97"
