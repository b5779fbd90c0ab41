"""Every refusal has a status, an error object, and a hint where trying again may help."""

import pytest

from serving import errors as grpc_errors
from serving.errors import InvalidField, QueueFull, Refusal, TooLong, TooManyCalls
from serving.http import errors


def kinds() -> list[type[Refusal]]:
    found, open_ = [], [Refusal]
    while open_:
        more = open_.pop().__subclasses__()
        found += more
        open_ += more
    return [kind for kind in found if kind.__module__.startswith("serving.") and kind is not errors.HttpRefusal]


@pytest.mark.parametrize("kind", kinds())
def test_each_has_its_status(kind):
    words = {InvalidField: ("f", "m"), TooLong: ("f", "m"), TooManyCalls: ("m", 1000)}
    refusal = kind(*words.get(kind, ("m",)))
    assert errors.status(refusal) >= 400
    assert (errors.status(refusal) >= 500) == (kind.__name__ in {"NotServing", "EngineFailed", "ManyBodies"})
    assert errors.body(refusal)["error"]["code"] not in (None, "internal_error")


def test_the_queue_says_when_to_come_again():
    refusal = QueueFull("8 requests wait")
    assert errors.status(refusal) == 429
    assert errors.headers(refusal) == [(b"retry-after", b"1"), (b"retry-after-ms", b"1000")]
    assert errors.headers(InvalidField("a", "b")) == []


@pytest.mark.parametrize(
    ("refusal", "chat", "field", "message"),
    [
        (InvalidField("sampling.top_k", "-1 is bad"), True, "top_k", "top_k: -1 is bad"),
        (InvalidField("sampling.top_logprobs", "21"), True, "top_logprobs", "top_logprobs: 21"),
        (InvalidField("sampling.top_logprobs", "21"), False, "logprobs", "logprobs: 21"),
        (TooLong("token_ids", "long"), False, "prompt", "prompt: long"),
        (InvalidField("n", "(sampling.temperature is 0)"), False, "n", "n: (temperature is 0)"),
    ],
)
def test_fields_have_the_names_that_the_client_used(refusal, chat, field, message):
    named = errors.in_body_names(refusal, chat=chat)
    assert (type(named), named.field, str(named)) == (type(refusal), field, message)
    assert errors.body(named)["error"]["param"] == field


def test_a_prompt_too_long_has_the_code_that_clients_look_for():
    assert errors.body(TooLong("prompt", "x"))["error"]["code"] == "context_length_exceeded"
    assert issubclass(grpc_errors.TooLong, InvalidField)
