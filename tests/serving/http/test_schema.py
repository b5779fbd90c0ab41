"""Bodies: what is taken, and by which name the rest is refused."""

import json

import pydantic
import pytest

from serving.errors import InvalidField
from serving.http.schema import ChatBody, CompletionBody, TokenizeBody, decoded

USER = {"role": "user", "content": "hi"}


def completion(**fields) -> CompletionBody:
    return decoded(json.dumps({"prompt": "a", **fields}).encode(), CompletionBody)


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_four_kinds_of_prompts(prompt):
    assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"foo": 1}, "foo"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"temperature": "1"}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"logit_bias": {"1": None}}, "logit_bias.1"),
        ({"stop_token_ids": [0, 2**31]}, "stop_token_ids[1]"),
        ({"stream_options": {"other": 1}}, "stream_options.other"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [USER]}, "messages"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"guided_json": 1}, "guided_json"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_refused_by_name(fields, field):
    with pytest.raises(InvalidField) as error:
        completion(**fields)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


def test_what_asks_for_nothing_is_taken():
    body = completion(
        best_of=1, suffix=None, tools=[], response_format={"type": "text"}, user="me", metadata={"a": "b"},
        stream_options=None, guided_json=None, priority=0, n=None, temperature=1,
    )  # fmt: skip
    assert body.temperature == 1.0


STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [[1, 2]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},  # lm-eval
        {**STREAM, "max_tokens": 5, "stop": None, "ignore_eos": True},  # guidellm
        {**STREAM, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None},  # vllm bench
    ],
)
def test_bodies_of_tools_are_taken(fields):
    body = completion(**fields)
    assert body.model_dump(exclude_unset=True) == {"prompt": "a", **fields}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "no JSON"),
        (b'{"prompt": "\\ud800"}', "no JSON"),
        (b'{"prompt": "\xff"}', "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "no JSON"),
        (b'{"prompt": ' + b"9" * 100_000 + b"}", "no JSON"),
    ],
)
def test_no_json_is_refused_as_such(data, words):
    with pytest.raises(InvalidField, match=f"body: is {words}"):
        decoded(data, CompletionBody)


def test_messages_have_texts_or_parts_of_text_and_what_clients_send_back():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent_back = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": None}
    body = decoded(json.dumps({"messages": [USER, {"role": "user", "content": parts}, sent_back]}).encode(), ChatBody)
    assert [part.text for part in body.messages[1].content] == ["a", "b"]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "a", "name": "me"}, "messages[0].name"),
        ({"content": "a"}, "messages[0].role"),
    ],
)
def test_other_messages_are_refused_by_place(message, field):
    with pytest.raises(InvalidField) as error:
        decoded(json.dumps({"messages": [message]}).encode(), ChatBody)
    assert error.value.field == field


def test_a_field_of_one_kind_is_not_neutral_in_it():
    assert decoded(b'{"prompt": "a", "add_special_tokens": false}', TokenizeBody).add_special_tokens is False


MANY = 1_000_000


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b'{"prompt": [' + b'"",' * MANY + b"1]}", "prompt"),
        (b'{"prompt": [' + b"[]," * MANY + b"1]}", "prompt"),
        (b'{"prompt": [' + b"1.5," * MANY + b"1]}", "prompt"),
        (b'{"prompt": "a", "stop": [' + b"1," * MANY + b"1]}", "stop"),
        (b'{"prompt": "a", "stop_token_ids": [' + b"null," * MANY + b"1]}", "stop_token_ids[0]"),
        (b'{"messages": [' + b"{}," * MANY + b"{}]}", "messages[0].role"),
        (b'{"messages": [{"role": "a", "content": [' + b"{}," * MANY + b"{}]}]}", "messages[0].content"),
    ],
)
def test_of_a_million_wrong_values_one_is_told(data, field):
    with pytest.raises(InvalidField) as error:
        decoded(data, ChatBody if b"messages" in data else CompletionBody)
    assert error.value.field == field
    cause = error.value.__context__
    assert isinstance(cause, pydantic.ValidationError)
    assert cause.error_count() < 10


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ('{"prompt": "a", %s}', "body"),
        ('{"prompt": "a", "logit_bias": {%s}}', "logit_bias"),
        ('{"prompt": "a", "metadata": {%s}}', "metadata"),
        ('{"prompt": "a", "stream_options": {%s}}', "stream_options"),
    ],
)
def test_objects_of_many_keys_are_refused_unseen(place, field):
    keys = ", ".join(f'"{i}": {{}}' for i in range(10_000))
    with pytest.raises(InvalidField, match="has more than [0-9]* keys") as error:
        decoded((place % keys).encode(), CompletionBody)
    assert error.value.field == field
