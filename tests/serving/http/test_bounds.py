"""Every field of every body over HTTP: at its bounds, one past them, at the ends of JSON; all pairs of sampling
parameters; any JSON at all. What comes is an answer or a refusal that names a field, and the next request is served.
Over gRPC: ../test_bounds.py.
"""

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.client import generate_request
from serving.http import schema
from serving.http.schema import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from tests.support.bounds import each
from tests.support.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.support.fake_engine import FakeManager
from tests.support.live_http import TEMPLATE, LiveHttp, live_http
from tests.support.live_server import eventually

USER = {"role": "user", "content": "hi"}
ROUTES: dict[str, tuple[type[pydantic.BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "abc", "max_tokens": 2}),
    "/v1/chat/completions": (ChatBody, {"messages": [USER], "max_tokens": 2}),
    "/tokenize": (TokenizeBody, {"prompt": "abc"}),
    "/detokenize": (DetokenizeBody, {"tokens": [97]}),
}
VALUES = (
    None, True, False, 0, 1, -1, 65, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e-45, 1e308,
    math.nan, math.inf, "", "a", "\x00é𝄞", "\ud800", "x" * 5000, [], [0], [-1], [2**31], ["a"], [[1]], [None], {},
    {"5": 1.0}, {"-1": 1}, {"a": {}}, [{}],
)  # fmt: skip
"""NaN, infinity and half a surrogate are no JSON, but what Python's clients write for them is sent."""


def sent(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def post(live: LiveHttp, path: str, body: bytes) -> httpx.Response:
    return await live.http.post(path, content=body, headers={"content-type": "application/json"})


FEW = (None, True, -1, 2**31, 2**63 - 1, 2**63, 0.5, math.nan, "\ud800", [-1], {"a": {}}, "x" * 5000)
HOW_MANY = [pytest.param(FEW, id="few"), pytest.param(VALUES, id="all", marks=pytest.mark.slow)]


async def probe(live: LiveHttp) -> None:
    """The engine behind both ports serves; over gRPC, which takes a fraction of the time."""
    good = await live.live.client.generate(generate_request([5, 6], max_tokens=2), 120)
    assert good.token_ids == [5, 6]


async def probe_http(live: LiveHttp) -> None:
    response = await live.post("/v1/completions", prompt="abc", max_tokens=2)
    assert response.status_code == 200, response.text


async def tried(live: LiveHttp, path: str, body: dict[str, Any]) -> httpx.Response:
    """Send it, see an answer or a refusal that names a field, and probe."""
    response = await post(live, path, sent(body))
    assert response.status_code in (200, 400, 404), (path, str(body)[:300], response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["param"], (path, str(body)[:300], error)
        assert error["message"].startswith(error["param"]), error
        if response.status_code == 404:
            assert error["param"] == "model"
    await probe(live)
    return response


def served(test) -> None:
    """Run it, and see that the next request over HTTP is served and nothing stays."""

    async def run():
        async with live_http(
            manager=FakeManager(max_waiting=2048), tokenizer=byte_tokenizer(chat_template=TEMPLATE)
        ) as live:
            await test(live)
            await probe_http(live)
            await eventually(lambda: not live.live.manager.running and not live.live.manager.waiting)

    asyncio.run(run())


# ------------------------------------------------------------------------------------------- at bounds, and one past

# Numbers: the smallest, the largest, and one past each.
BOUNDS: dict[str, tuple[float, float, float, float]] = {
    "frequency_penalty": (-2, 2, -2.0001, 2.0001),
    "max_completion_tokens": (1, 2039, 0, 2048),  # the largest one depends on the prompt
    "max_tokens": (1, 2039, 0, 2048),
    "min_p": (0, 1, -1e-6, 1.0001),
    "min_tokens": (0, 2, -1, 3),
    "n": (1, 64, 0, 65),
    "presence_penalty": (-2, 2, -2.0001, 2.0001),
    "repetition_penalty": (0.1, 10, 0.0999, 10.001),
    "seed": (-(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
    "temperature": (0, 100, -1e-6, 100.01),
    "top_k": (-1, VOCAB_SIZE, -2, VOCAB_SIZE + 1),
    "top_p": (1e-6, 1, 0, 1.0001),
    "top_logprobs": (0, 20, -1, 21),
    "logprobs": (0, 20, -1, 21),
}


def of_type(kind: type[pydantic.BaseModel], *types: type) -> set[str]:
    """The fields that may hold one of the types."""
    return {name for name, field in kind.model_fields.items() if types_in(field.annotation) & {*types}}


def types_in(annotation: Any) -> set[Any]:
    """Of a union with None; those within lists and maps are not meant."""
    return (
        {annotation}
        if not get_args(annotation)
        else {get_args(a)[0] if get_args(a) else a for a in get_args(annotation)}
    )


def test_every_number_has_bounds_in_this_file():
    assert of_type(CompletionBody, int, float) | of_type(ChatBody, int, float) == BOUNDS.keys()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_number_is_taken_at_its_bounds_and_refused_by_name_past_them(path):
    async def test(live: LiveHttp):
        kind, base = ROUTES[path]

        async def one(name: str, value: float) -> None:
            low, high, *_ = BOUNDS[name]
            beside = {"logprobs": True} if name == "top_logprobs" else {}
            if name == "max_completion_tokens":
                beside["max_tokens"] = None
            if name == "n":
                beside["max_tokens"] = 1
            response = await tried(live, path, {**base, **beside, name: value})
            assert response.status_code == (200 if value in (low, high) else 400), (name, value, response.text)
            if value not in (low, high):
                param = response.json()["error"]["param"]
                expected = {name, "max_tokens"} if name == "max_completion_tokens" else {name}
                assert param in expected or (not math.isfinite(value) and param == "body"), (name, value, param)

        names = sorted(of_type(kind, int, float))
        await each(one, ((name, value) for name in names for value in (*BOUNDS[name], 2**63, math.nan, math.inf)))

    served(test)


def test_how_many_and_how_long():
    async def test(live: LiveHttp):
        for name, good, bad in (
            ("stop", ["x" * 256] * 16, ["x"] * 17),
            ("stop", "x" * 256, "x" * 257),
            ("stop_token_ids", [1] * 64, [1] * 65),
            ("stop_token_ids", [0, VOCAB_SIZE - 1], [VOCAB_SIZE]),
            ("logit_bias", {"0": -100, str(VOCAB_SIZE - 1): 100}, {"0": 100.001}),
            ("logit_bias", {str(token): 1 for token in range(100)}, {str(token): 1 for token in range(2049)}),
            ("request_id", "x" * 100, "x" * 101),
            ("prompt", ["a"] * 128, ["a"] * 129),
            ("prompt", [[5]] * 128, [[5]] * 129),
            ("prompt", [5] * 2046, [5] * 2048),
            ("metadata", {str(key): "" for key in range(64)}, {str(key): "" for key in range(65)}),
        ):
            for value, status in ((good, 200), (bad, 400)):
                body = {"prompt": "abc", "max_tokens": 1, name: value}
                response = await tried(live, "/v1/completions", body)
                assert response.status_code == status, (name, str(value)[:50], response.text)
                assert status == 200 or response.json()["error"]["param"].split("[")[0].split(".")[0] == name

    served(test)


# ---------------------------------------------------------------------------------------------- any value in any field


def nested(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, body): `value` in each field of the objects within bodies."""
    for name in schema.StreamOptions.model_fields:
        options = {name: value}
        yield "/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": options}
    for name in schema.MessageBody.model_fields:
        yield "/v1/chat/completions", {"messages": [{**USER, name: value}], "max_tokens": 1}
    for name in schema.TextPart.model_fields:
        part = {"type": "text", "text": "a", name: value}
        yield "/v1/chat/completions", {"messages": [{**USER, "content": [part]}], "max_tokens": 1}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("values", HOW_MANY)
def test_every_field_takes_any_value_or_refuses_by_name(path, values):
    async def test(live: LiveHttp):
        kind, base = ROUTES[path]
        # The common fields once: both kinds of generation check them alike.
        names = kind.model_fields.keys() - (GenerationBody.model_fields.keys() if kind is ChatBody else set())
        bodies = ({**base, name: value} for name in (*sorted(names), "no_such_field") for value in values)
        await each(tried, ((live, path, body) for body in bodies))

    served(test)


@pytest.mark.parametrize("values", HOW_MANY)
def test_every_field_of_objects_within_takes_any_value_or_refuses_by_name(values):
    async def test(live: LiveHttp):
        await each(tried, ((live, *case) for value in values for case in nested(value)))

    served(test)


# ------------------------------------------------------------------------------------------------------------ pairs

PARAMETERS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, -1),
    "top_k": (VOCAB_SIZE, -2),
    "top_p": (1e-6, 1.5),
    "seed": (2**63 - 1, 2**63),
    "min_p": (1, 1.5),
    "min_tokens": (2, 2**63 - 1),
    "presence_penalty": (2, 2.1),
    "frequency_penalty": (-2, -2.1),
    "repetition_penalty": (10, 0),
    "logit_bias": ({"0": -100}, {"-1": 1}),
    "logprobs": (20, 21),
    "n": (8, 65),
    "max_tokens": (60, 0),
    "stop": (["x" * 256] * 16, [""]),
    "stop_token_ids": ([0] * 64, [-1]),
    "ignore_eos": (True, 1),
    "echo": (True, 1),
    "stream": (True, 1),
}


@pytest.mark.slow  # the default suite has those of gRPC, which HTTP is translated into
def test_all_pairs_of_parameters():
    async def test(live: LiveHttp):
        async def one(fields: dict[str, Any]) -> None:
            response = await tried(live, "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, **fields})
            wrong = [name for name, value in fields.items() if value is PARAMETERS[name][1]]
            if response.status_code == 200:
                assert not wrong or wrong == ["max_tokens"], fields  # 0 with echo: the prompt alone
            else:
                param = response.json()["error"]["param"].split("[")[0].split(".")[0]
                assert param in fields, (fields, response.text)

        pairs = (
            (dict(zip(names, values, strict=True)),)
            for names in itertools.combinations(PARAMETERS, 2)
            for values in itertools.product(*(PARAMETERS[name] for name in names))
        )
        await each(one, pairs)

    served(test)


# ---------------------------------------------------------------------------------------------------- any JSON at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "tools", "best_of"} - {"n"}))


@settings(max_examples=4, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ROUTES)), st.dictionaries(NAMES, JSON, max_size=5)), min_size=10, max_size=10
    )
)
def test_any_json_is_served_or_refused_by_name(bodies):
    async def test(live: LiveHttp):
        for path, fields in bodies:
            await tried(live, path, {**ROUTES[path][1], **fields})

    served(test)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"1", b'"a"', b"{", b'{"prompt"', b"\xff", b"[" * 100_000, b"{}" * 2]
)
def test_what_is_no_object_is_refused(body):
    async def test(live: LiveHttp):
        for path in ROUTES:
            response = await post(live, path, body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "body")
            await probe(live)

    served(test)
