"""Every field of a body to its place in the gRPC message; OpenAI's defaults where they are not ours."""

import json

import pytest

from serving.client import generate_request
from serving.errors import InvalidField
from serving.http import translate
from serving.http.schema import ChatBody, CompletionBody, decoded
from serving.proto.loong.v1 import loong_pb2 as pb


def body(**fields) -> CompletionBody:
    return decoded(json.dumps({"prompt": "a", **fields}).encode(), CompletionBody)


def chat(**fields) -> ChatBody:
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "c"}] * 2}]
    return decoded(json.dumps({"messages": messages, **fields}).encode(), ChatBody)


def test_every_field_has_its_place():
    fields = {
        "frequency_penalty": 0.25, "min_p": 0.125, "min_tokens": 3, "n": 2, "presence_penalty": 0.5,
        "repetition_penalty": 1.5, "seed": 7, "temperature": 0.75, "top_k": 9, "top_p": 0.5, "ignore_eos": True,
        "stop_token_ids": [4], "max_tokens": 11,
    }  # fmt: skip
    (request,) = translate.completion_requests(
        body(**fields, stop="x", logit_bias={"5": -1, "6": 2.5}, logprobs=3, echo=True), "r"
    )
    assert request == generate_request(
        "a", **fields, stop=["x"], logit_bias={5: -1.0, 6: 2.5}, top_logprobs=3, prompt_logprobs=3, request_id="r"
    )


def test_defaults_of_completions_and_of_chat():
    (request,) = translate.completion_requests(body(), "r")
    assert request == generate_request("a", temperature=1.0, max_tokens=16, request_id="r")
    expected = generate_request(
        pb.Messages(messages=[pb.Message(role="system", content="b"), pb.Message(role="user", content="c\nc")]),
        temperature=1.0,
        request_id="r",
    )
    assert translate.chat_request(chat(), "r") == expected
    assert translate.chat_request(chat(max_tokens=5, max_completion_tokens=6), "r").max_tokens == 6
    assert translate.chat_request(chat(logprobs=True, top_logprobs=2), "r").sampling.top_logprobs == 2


def test_prompts_become_requests_with_names_of_their_own():
    requests = translate.completion_requests(body(prompt=[[1, 2], [3]]), "r")
    assert [(list(it.token_ids.ids), it.request_id) for it in requests] == [([1, 2], "r-0"), ([3], "r-1")]
    (request,) = translate.completion_requests(body(prompt=[1, 2]), "r")
    assert (list(request.token_ids.ids), request.request_id) == ([1, 2], "r")


def test_filters_that_do_nothing_at_temperature_0_are_taken_if_they_are_in_range():
    (request,) = translate.completion_requests(body(temperature=0, top_p=0.9, top_k=40, min_p=0.1), "r")
    assert request == generate_request("a", temperature=0.0, max_tokens=16, request_id="r")
    for fields in ({"top_p": 0}, {"min_p": 2}, {"top_k": -2}):
        with pytest.raises(InvalidField, match=next(iter(fields))):
            translate.completion_requests(body(temperature=0, **fields), "r")


def test_seeds_of_64_bits_are_folded_and_top_k_of_minus_one_is_all():
    (request,) = translate.completion_requests(body(seed=-1, top_k=-1), "r")
    assert (request.sampling.seed, request.sampling.top_k) == (2**32 - 1, 0)


def test_an_echo_without_tokens_generates_one_that_is_not_sent():
    (request,) = translate.completion_requests(body(echo=True, max_tokens=0, logprobs=1), "r")
    assert request.max_tokens == 1
    (request,) = translate.completion_requests(body(max_tokens=0), "r")
    assert request.max_tokens == 0, "which validation refuses"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1]] * 65, "n": 2}, "n"),
        ({"echo": True, "logprobs": 1, "n": 2, "stream": True}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"2147483648": 1}}, "logit_bias"),
    ],
)
def test_what_no_message_can_say_is_refused_by_name(fields, field):
    with pytest.raises(InvalidField) as error:
        translate.completion_requests(body(**fields), "r")
    assert error.value.field == field


def test_top_logprobs_of_chat_need_logprobs():
    with pytest.raises(InvalidField, match="top_logprobs: needs logprobs"):
        translate.chat_request(chat(top_logprobs=2), "r")


@pytest.mark.parametrize("name", ["", "x" * 101, "é", "a\nb"])
def test_names_that_no_header_can_carry_are_refused(name):
    with pytest.raises(InvalidField, match="request_id"):
        translate.check_request_id(name)
