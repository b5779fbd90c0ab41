"""Every field of every request message over gRPC: at its bounds, one past them, at the ends of its type; all pairs of
sampling parameters; anything at all. What comes is an answer or a refusal that names a field, and the next request is
served. What bodies over HTTP may hold is in http/test_bounds.py; bytes that are no messages, in test_fuzz.py.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.client import generate_request
from serving.device_trace import DeviceTrace
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.bounds import METHODS, NUMBERS, VALUES, Path, changed, each, leaves, name_of, put
from tests.support.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_http import TEMPLATE
from tests.support.live_server import Live, eventually, live_server

PROMPT = [5, 6, 7]
OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
BASES: dict[str, Message] = {
    "Generate": generate_request(PROMPT, max_tokens=2, temperature=1.0),
    "Tokenize": pb.TokenizeRequest(text="a"),
    "Detokenize": pb.DetokenizeRequest(token_ids=[97]),
}
OTHER_CODES = {"Abort": {grpc.StatusCode.NOT_FOUND}}
"""What else a method may answer to a request that it understands."""
# Drain is not for one that goes on, and GenerateUnary takes what Generate does.
TRIED = [method for method in METHODS if method.name not in ("Drain", "GenerateUnary")]


async def answer(live: Live, method, request: Message | bytes) -> tuple[grpc.StatusCode, str]:
    """The status; of a stream without an end, that of its first message."""
    channel = live.client._channel
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    data = request if isinstance(request, bytes) else request.SerializeToString()
    call = kind(f"/{method.containing_service.full_name}/{method.name}")(data, timeout=120)
    try:
        if method.name == "WatchGroups":
            await call.read()
            call.cancel()
        elif method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return OK, ""


async def probe(live: Live) -> None:
    """A plain request is served."""
    good = await live.client.generate(generate_request(PROMPT, max_tokens=2), 120)
    assert good.token_ids == echo(PROMPT, 2)


async def tried(live: Live, method, request: Message, what: object, allowed: Iterable[grpc.StatusCode] = ()) -> Any:
    """Send it, see an answer or a refusal that begins with the name of a field, and probe."""
    code, words = await answer(live, method, request)
    if code is INVALID:
        roots = {field.name for field in method.input_type.fields} | {"prompt"}
        assert words.split(":")[0].split(".")[0].split("[")[0] in roots, (method.name, what, words)
    else:
        assert code in {OK, *allowed}, (method.name, what, code, words)
    await probe(live)
    return code, words


def served(test, **options) -> None:
    async def run():
        trace = DeviceTrace(options.pop("folder", None), lambda folder: None, lambda: None)
        manager = FakeManager(max_waiting=2048)
        async with live_server(
            manager=manager, tokenizer=byte_tokenizer(chat_template=TEMPLATE), trace=trace, **options
        ) as live:
            await test(live)
            await eventually(lambda: not live.manager.running and not live.manager.waiting)
            view = live.manager.view()
            assert all(instance.free_pages == instance.num_pages for instance in view.instances), "pages are free again"

    asyncio.run(run())


def base_of(method, path: Path | None = None) -> Message:
    return BASES.get(method.name, method.input_type._concrete_class())


# ------------------------------------------------------------------------------------------- at bounds, and one past

UP, DOWN = math.inf, -math.inf


def above(value: float) -> float:
    """The next float32 is near enough: bounds forgive rounding of the wire in the last digits."""
    return value * (1 + 1e-5) if value > 0 else value * (1 - 1e-5) if value < 0 else 1e-5


# (message, field) -> the smallest and the largest value, and what they need beside them.
BOUNDS: dict[tuple[str, str], tuple[float, float, dict[str, Any]]] = {
    ("GenerateRequest", "token_ids.ids"): (0, VOCAB_SIZE - 1, {}),
    ("GenerateRequest", "max_tokens"): (1, 2045, {}),
    ("GenerateRequest", "n"): (1, 64, {"max_tokens": 1}),
    ("GenerateRequest", "prompt_logprobs"): (0, 20, {}),
    ("GenerateRequest", "stop_token_ids"): (0, VOCAB_SIZE - 1, {}),
    ("GenerateRequest", "sampling.temperature"): (0, 100, {}),
    ("GenerateRequest", "sampling.top_k"): (0, VOCAB_SIZE, {}),
    ("GenerateRequest", "sampling.top_p"): (1e-45, 1, {}),
    ("GenerateRequest", "sampling.seed"): (0, 2**32 - 1, {}),
    ("GenerateRequest", "sampling.min_p"): (0, 1, {}),
    ("GenerateRequest", "sampling.min_tokens"): (0, 2, {}),
    ("GenerateRequest", "sampling.presence_penalty"): (-2, 2, {}),
    ("GenerateRequest", "sampling.frequency_penalty"): (-2, 2, {}),
    ("GenerateRequest", "sampling.repetition_penalty"): (0.1, 10, {}),
    ("GenerateRequest", "sampling.logit_bias.value"): (-100, 100, {}),
    ("GenerateRequest", "sampling.logit_bias.key"): (0, VOCAB_SIZE - 1, {}),
    ("GenerateRequest", "sampling.top_logprobs"): (0, 20, {}),
    ("DetokenizeRequest", "token_ids"): (0, VOCAB_SIZE - 1, {}),
    ("WatchGroupsRequest", "interval_ms"): (50, 60_000, {}),
    ("StartProfileRequest", "duration_ms"): (100, 600_000, {}),
}
_ZERO_IS_THE_SMALLEST = {"sampling.top_p"}  # above 0: there is no value between
_REFUSED_AS = {"sampling.logit_bias.value": "sampling.logit_bias", "sampling.logit_bias.key": "sampling.logit_bias"}


def numbers() -> dict[tuple[str, str], tuple[Any, Path]]:
    """(message, field) -> (a method that takes it, the way to the field), of all numbers in requests."""
    found = {}
    for method in TRIED:
        for path in leaves(method.input_type):
            if path[-1].cpp_type in NUMBERS:
                found[method.input_type.name, name_of(path)] = (method, path)
    return found


def test_every_number_has_bounds_in_this_file():
    assert numbers().keys() == BOUNDS.keys()


def numbers_to_try() -> Iterator[tuple[str, str, float]]:
    """(message, field, value): at the bounds, one past them, and what the type holds beyond."""
    found = numbers()
    for (message, field), (low, high, _) in BOUNDS.items():
        _, path = found[message, field]
        whole = isinstance(VALUES[path[-1].cpp_type][0], int)
        past = [low - 1, high + 1] if whole else [-above(-low), above(high), math.nan, math.inf, -math.inf]
        if field in _ZERO_IS_THE_SMALLEST:
            past[0] = 0.0
        past += [value for value in VALUES[path[-1].cpp_type] if not low <= value <= high]
        yield from ((message, field, value) for value in (low, high, *past))


def test_every_number_is_taken_at_its_bounds_and_refused_by_name_past_them(tmp_path):
    found = numbers()

    async def test(live: Live):
        profiles = asyncio.Lock()  # one at a time, so that each may start

        async def one(message: str, field: str, value: float) -> None:
            method, path = found[message, field]
            low, high, beside = BOUNDS[message, field]
            request = changed(base_of(method), path, value)
            for name, other in beside.items():
                setattr(request, name, other)
            async with profiles if method.name == "StartProfile" else contextlib.nullcontext():
                code, words = await answer(live, method, request)
                if method.name == "StartProfile" and code is OK:
                    await live.client.stub.StopProfile(pb.StopProfileRequest())
            if value in (low, high):
                assert code is OK, (field, value, words)
            else:
                assert code is INVALID, (field, value, code)
                name = _REFUSED_AS.get(field, field).split(".ids")[0]
                assert words.startswith(f"{name}: "), (field, value, words)
            await probe(live)

        await each(one, numbers_to_try())

    served(test, folder=tmp_path)


@pytest.mark.parametrize(
    ("field", "most", "value"),
    [
        ("stop_token_ids", 64, 1),
        ("stop", 16, "never"),
        ("token_ids.ids", 2047, 5),
        ("messages.messages.content", 4096, ""),
    ],
)
def test_how_many_there_may_be(field, most, value):
    async def test(live: Live):
        method = TRIED[0]
        (path,) = (path for path in leaves(method.input_type) if name_of(path) == field)
        for times, expected in ((most, OK), (most + 1, INVALID), (50 * most, INVALID)):
            request = generate_request(PROMPT, max_tokens=1)
            if field.startswith("messages"):
                request.messages.messages.extend([pb.Message(role="u", content=value)] * times)
            else:
                request.ClearField(path[0].name)
                put(request, path, value, times)
            code, words = await answer(live, method, request)
            if field.startswith("messages") and expected is OK:
                assert code is OK or words.startswith("messages: the prompt has"), words  # roles take tokens
            else:
                assert code is expected, (times, words)
                assert not words or words.startswith(field.split(".")[0]), words
            await probe(live)

    served(test)


@pytest.mark.parametrize(("field", "most"), [("request_id", 128), ("stop", 256), ("messages.messages.role", 64)])
def test_how_long_a_text_may_be(field, most):
    async def test(live: Live):
        method = TRIED[0]
        for length, expected in ((1, OK), (most, OK), (most + 1, INVALID), (0, INVALID), (10**6, INVALID)):
            request = generate_request(PROMPT, max_tokens=2)
            if field == "request_id":
                request.request_id = "x" * length
            elif field == "stop":
                request.stop.append("x" * length)
            else:
                request.messages.messages.add(role="u" * length, content="hi")
            code, words = await answer(live, method, request)
            assert code is expected, (length, words)
            assert not words or words.startswith(("messages[0].role: ", "request_id: ", "stop: ")), words
            await probe(live)

    served(test)


# ---------------------------------------------------------------------------------------------- any value in any field


def test_every_field_takes_any_value_or_refuses_by_name(tmp_path):
    async def test(live: Live):
        async def one(method, path: Path, value: Any) -> None:
            request = changed(base_of(method), path, value)
            await tried(live, method, request, (name_of(path), value), OTHER_CODES.get(method.name, ()))
            if method.name == "StartProfile":
                await answer(live, METHODS_BY_NAME["StopProfile"], pb.StopProfileRequest())

        cases = [
            (method, path, value)
            for method in TRIED
            for path in leaves(method.input_type)
            for value in VALUES[path[-1].cpp_type]
        ]
        profiles = [case for case in cases if case[0].name == "StartProfile"]
        await each(one, (case for case in cases if case[0].name != "StartProfile"))
        for case in profiles:  # one profile at a time
            await one(*case)

    served(test, folder=tmp_path)


METHODS_BY_NAME = {method.name: method for method in METHODS}
GENERATE = METHODS_BY_NAME["Generate"]


# ------------------------------------------------------------------------------------------------------------ pairs

# Of each parameter: the smallest, the largest, one that is refused.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 100.0, math.nan),
    "top_k": (0, VOCAB_SIZE, -1),
    "top_p": (1e-6, 1.0, 1.5),
    "seed": (0, 2**32 - 1, 2**32),
    "min_p": (0.0, 1.0, math.inf),
    "min_tokens": (0, 2, 2**63 - 1),
    "presence_penalty": (-2.0, 2.0, 2.1),
    "frequency_penalty": (-2.0, 2.0, math.nan),
    "repetition_penalty": (0.1, 10.0, 0.0),
    "logit_bias": ({}, {0: -100.0, VOCAB_SIZE - 1: 100.0}, {-1: 1.0}),
    "top_logprobs": (0, 20, 21),
    "prompt_logprobs": (0, 20, -1),
    "n": (1, 8, 65),
    "max_tokens": (1, 60, 0),
    "stop": ((), ("x" * 256,) * 16, ("",)),
    "stop_token_ids": ((), (0,) * 64, (-1,)),
    "ignore_eos": (False, True),
}


async def try_pair(live: Live, fields: dict[str, Any]) -> None:
    request = generate_request(PROMPT, **{"max_tokens": 2, "temperature": 1.0, **fields})
    code, words = await answer(live, GENERATE, request)
    refused = [name for name, value in fields.items() if len(PARAMETERS[name]) > 2 and value is PARAMETERS[name][2]]
    if code is OK:
        assert not refused, fields
    else:
        assert code is INVALID, (fields, code, words)
        assert words.split(":")[0].removeprefix("sampling.") in fields, (fields, words)
    await probe(live)


def test_all_pairs_of_parameters():
    async def test(live: Live):
        pairs = (
            (live, dict(zip(names, values, strict=True)))
            for names in itertools.combinations(PARAMETERS, 2)
            for values in itertools.product(*(PARAMETERS[name] for name in names))
        )
        await each(try_pair, pairs)

    served(test)


# ---------------------------------------------------------------------------------------------------- several at once


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Up to six fields of any value of their types, small ones likelier."""
    request = generate_request(PROMPT, max_tokens=2)
    paths = list(leaves(pb.GenerateRequest.DESCRIPTOR))
    for path in draw(st.lists(st.sampled_from(paths), max_size=6)):
        field = path[-1]
        if field.cpp_type == field.CPPTYPE_STRING:
            value = draw(st.text(max_size=300))
        elif field.cpp_type == field.CPPTYPE_BOOL:
            value = draw(st.booleans())
        elif isinstance(VALUES[field.cpp_type][0], int):
            most = 2**31 if field.cpp_type == field.CPPTYPE_INT32 else 2**63
            value = draw(st.integers(-3, 70) | st.integers(-most, most - 1))
        else:
            value = draw(st.floats(width=32) | st.floats(-3, 3, width=32))
        put(request, path, value)
    return request


@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.lists(requests(), min_size=20, max_size=20))
def test_any_fields_together_are_served_or_refused_by_name(batch):
    async def test(live: Live):
        for index, request in enumerate(batch):
            if request.n > 64 or request.n < 1:
                request.ClearField("n")
            if any(request.request_id == other.request_id for other in batch[:index]):
                request.ClearField("request_id")
        await each(tried, ((live, GENERATE, request, request) for request in batch))

    served(test)
