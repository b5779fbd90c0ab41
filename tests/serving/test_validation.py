"""Bad input, clear words: each refusal through a real server names its field, and everything else goes on."""

import asyncio
import math

import grpc
import pytest

from serving.client import chat_messages, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, byte_tokenizer
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_server import live_server

PROMPT = [5, 6, 7]
POOL_TOKENS = 4 * 256 * 4
TOP = {"temperature": 1.0}


def request(**fields) -> pb.GenerateRequest:
    return generate_request(fields.pop("prompt", PROMPT), **fields)


BAD = [
    ("no prompt", pb.GenerateRequest(), "prompt", "text or token_ids"),
    ("empty text", request(prompt=""), "text", "empty"),
    ("empty ids", request(prompt=[]), "token_ids", "empty"),
    ("id too large", request(prompt=[1, 2, VOCAB_SIZE, 9]), "token_ids", f"token {VOCAB_SIZE} at index 2"),
    ("id largest", request(prompt=[2**31 - 1]), "token_ids", "at index 0"),
    ("id negative", request(prompt=[1, -1]), "token_ids", "token -1 at index 1"),
    ("longer than the context", request(prompt=[1] * 2048), "token_ids", "2048 tokens"),
    ("longer than the pool", request(prompt=[1] * (POOL_TOKENS + 1)), "token_ids", "pool"),
    ("text longer than the context", request(prompt="x" * 3000), "text", "3001 tokens"),
    ("max_tokens 0", request(max_tokens=0), "max_tokens", "0 is not within 1 to"),
    ("max_tokens negative", request(max_tokens=-1), "max_tokens", "-1"),
    ("max_tokens huge", request(max_tokens=2**63 - 1), "max_tokens", "9223372036854775807"),
    ("max_tokens beyond the context", request(max_tokens=2046), "max_tokens", "after a prompt of 3"),
    ("temperature NaN", request(temperature=math.nan), "sampling.temperature", "nan"),
    ("temperature inf", request(temperature=math.inf), "sampling.temperature", "inf"),
    ("temperature negative", request(temperature=-0.5), "sampling.temperature", "-0.5"),
    ("temperature huge", request(temperature=1e30), "sampling.temperature", "not within"),
    ("temperature tiny", request(temperature=1e-30), "sampling.temperature", "greedy"),
    ("top_p NaN", request(top_p=math.nan, **TOP), "sampling.top_p", "nan"),
    ("top_p 0", request(top_p=0.0, **TOP), "sampling.top_p", "above 0"),
    ("top_p negative", request(top_p=-1.0, **TOP), "sampling.top_p", "above 0"),
    ("top_p above 1", request(top_p=1.5, **TOP), "sampling.top_p", "at most 1"),
    ("top_k negative", request(top_k=-1, **TOP), "sampling.top_k", "-1"),
    ("top_k above the vocabulary", request(top_k=VOCAB_SIZE + 1, **TOP), "sampling.top_k", "vocabulary"),
    ("top_k huge", request(top_k=2**63 - 1, **TOP), "sampling.top_k", "vocabulary"),
    ("seed negative", request(seed=-1), "sampling.seed", "-1"),
    ("seed huge", request(seed=2**32), "sampling.seed", "4294967296"),
    ("top_k of greedy", request(top_k=5), "sampling.top_k", "contradicts"),
    ("top_p of greedy", request(top_p=0.5, temperature=0.0), "sampling.top_p", "contradicts"),
    ("eos as a stop id and ignored", request(stop_token_ids=[EOS], ignore_eos=True), "stop_token_ids", "contradicts"),
    ("stop id outside", request(stop_token_ids=[1, VOCAB_SIZE]), "stop_token_ids", "at index 1"),
    ("stop id negative", request(stop_token_ids=[-5]), "stop_token_ids", "token -5"),
    ("many stop ids", request(stop_token_ids=[1] * 65), "stop_token_ids", "65"),
    ("10,000 stop strings", request(stop=[f"s{i}" for i in range(10_000)]), "stop", "10000 strings"),
    ("long stop string", request(stop=["ok", "x" * 257]), "stop", "index 1 has 257"),
    ("empty stop string", request(stop=[""]), "stop", "index 0 is empty"),
    ("empty request id", request(request_id=""), "request_id", "0 characters"),
    ("long request id", request(request_id="x" * 129), "request_id", "129 characters"),
    ("no chat template", request(prompt=chat_messages("hi")), "messages", "no chat template"),
    ("min_p NaN", request(min_p=math.nan, **TOP), "sampling.min_p", "nan"),
    ("min_p negative", request(min_p=-0.1, **TOP), "sampling.min_p", "within 0"),
    ("min_p above 1", request(min_p=1.1, **TOP), "sampling.min_p", "to 1"),
    ("min_p of greedy", request(min_p=0.5), "sampling.min_p", "contradicts"),
    ("min_tokens negative", request(min_tokens=-1), "sampling.min_tokens", "negative"),
    ("min_tokens above max_tokens", request(min_tokens=6, max_tokens=5), "sampling.min_tokens", "6 exceeds the 5"),
    ("presence NaN", request(presence_penalty=math.nan), "sampling.presence_penalty", "nan"),
    ("presence large", request(presence_penalty=2.1), "sampling.presence_penalty", "-2 to 2"),
    ("frequency small", request(frequency_penalty=-2.1), "sampling.frequency_penalty", "-2 to 2"),
    ("repetition 0", request(repetition_penalty=0.0), "sampling.repetition_penalty", "0.1 to 10"),
    ("repetition inf", request(repetition_penalty=math.inf), "sampling.repetition_penalty", "inf"),
    ("bias of no token", request(logit_bias={VOCAB_SIZE: 1.0}), "sampling.logit_bias", f"token {VOCAB_SIZE}"),
    ("bias of a negative token", request(logit_bias={-1: 1.0}), "sampling.logit_bias", "token -1"),
    ("bias NaN", request(logit_bias={5: math.nan}), "sampling.logit_bias", "nan of token 5"),
    ("bias large", request(logit_bias={5: 101.0}), "sampling.logit_bias", "-100 to 100"),
    ("10,000 biases", request(logit_bias=dict.fromkeys(range(10_000), 1.0)), "sampling.logit_bias", "limit of 1024"),
    ("biases beyond the engine", request(logit_bias=dict.fromkeys(range(101), 1.0)), "sampling.logit_bias", "100"),
    ("counts beyond the engine", request(frequency_penalty=1.0, max_tokens=102), "sampling.frequency_penalty", "101"),
    ("presence beyond the engine", request(presence_penalty=1.0, max_tokens=102), "sampling.presence_penalty", "101"),
    ("top_logprobs negative", request(top_logprobs=-1), "sampling.top_logprobs", "-1"),
    ("top_logprobs large", request(top_logprobs=21), "sampling.top_logprobs", "0 to 20"),
    ("prompt_logprobs large", request(prompt_logprobs=21), "prompt_logprobs", "0 to 20"),
    ("prompt_logprobs negative", request(prompt_logprobs=-1), "prompt_logprobs", "-1"),
    ("n 0", request(n=0, **TOP), "n", "1 to 64"),
    ("n 65", request(n=65, **TOP), "n", "1 to 64"),
    ("n huge", request(n=2**63 - 1, **TOP), "n", "9223372036854775807"),
    ("n of greedy", request(n=2), "n", "contradict"),
    ("odd request id", request(request_id="a\nb"), "request_id", "printable"),
]


async def refusal(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_every_bad_field_is_named_and_all_other_streams_go_on():
    async def run():
        async with live_server(step_s=0.01) as live:
            names = [f"other-{i}" for i in range(4)]
            others = [
                asyncio.create_task(live.client.generate(request(max_tokens=2000, request_id=name))) for name in names
            ]
            for what, bad, field, words in BAD:
                error = await refusal(live.client.generate(bad, 10))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, what
                assert error.details().startswith(f"{field}: "), (what, error.details())
                assert words in error.details(), (what, error.details())
                good = await live.client.generate(request(max_tokens=4), 10)
                assert good.token_ids == echo(PROMPT, 4), what
            assert not any(other.done() for other in others), "the probes must have run beside open streams"
            for name in names:
                await live.client.abort(name)
            for answer in await asyncio.gather(*others):
                assert answer.token_ids == echo(PROMPT, len(answer.token_ids))
                assert answer.finished.finish_reason == pb.FINISH_REASON_ABORT

    asyncio.run(run())


def test_messages_are_checked():
    def of(*turns):
        return request(prompt=pb.Messages(messages=[pb.Message(role=role, content=content) for role, content in turns]))

    bad = [
        (of(), "messages", "0 messages are not within 1 to 4096"),
        (of(*[("user", "x")] * 4097), "messages", "4097 messages"),
        (of(("user", "x"), ("", "y")), r"messages[1].role", "1 to 64 printable"),
        (of(("u" * 65, "x")), r"messages[0].role", "1 to 64 printable"),
        (of(("u\n", "x")), r"messages[0].role", "1 to 64 printable"),
        (of(("user", "x" * 3000)), "messages", "tokens"),
        (of(("user", "empty")), "messages", "the prompt is empty"),
        (of(("user", "refuse")), "messages", "chat_template: TemplateError: not this"),
    ]
    template = (
        "{% if messages[0].content == 'refuse' %}{{ raise_exception('not this') }}{% endif %}"
        "{% if messages[0].content != 'empty' %}{{ messages[0].content }}{% endif %}"
    )

    async def run():
        async with live_server(tokenizer=byte_tokenizer(chat_template=template)) as live:
            for message, field, words in bad:
                error = await refusal(live.client.generate(message, 20))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert error.details().startswith(f"{field}: "), error.details()
                assert words in error.details(), error.details()
        async with live_server(has_tokenizer=False) as live:
            error = await refusal(live.client.generate(of(("user", "x")), 20))
            assert error.details().startswith("messages: this model has no tokenizer")

    asyncio.run(run())


def test_bounds_themselves_are_served():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=64)) as live:
            for good in (
                request(temperature=0.01, max_tokens=1),
                request(temperature=100.0, top_k=VOCAB_SIZE, top_p=1.0, seed=2**32 - 1, max_tokens=1),
                request(temperature=0.0, top_k=1, top_p=1.0, seed=0, max_tokens=1),
                request(temperature=1.0, top_k=0, top_p=1e-6, max_tokens=1),
                request(max_tokens=2045),
                request(prompt=[0, VOCAB_SIZE - 1] * 1000, max_tokens=48, ignore_eos=True),
                request(stop=["x" * 256] * 16, stop_token_ids=[0] * 64, max_tokens=1),
                request(request_id="x" * 128, max_tokens=1),
                request(min_p=1.0, temperature=1.0, max_tokens=1),
                request(min_tokens=3, max_tokens=3, top_logprobs=20, prompt_logprobs=20),
                request(presence_penalty=2.0, frequency_penalty=-2.0, repetition_penalty=0.1, max_tokens=101),
                request(repetition_penalty=10.0, max_tokens=2000),
                request(logit_bias={token: 100.0 - 2 * token for token in range(100)}, max_tokens=1),
                request(n=64, temperature=1.0, max_tokens=1),
            ):
                answer = await live.client.generate(good, 20)
                assert answer.finished.usage.completion_tokens == good.max_tokens

    asyncio.run(run())


def test_a_prompt_the_manager_cannot_place_is_refused_by_name():
    """Fits the context, but prompt and answer need more pages than there are."""

    async def run():
        async with live_server(manager=FakeManager(num_instances=2, pages=4, page_tokens=16)) as live:
            error = await refusal(live.client.generate(request(prompt=[1] * 100, max_tokens=30)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            # 129 positions would fit the 128 of the pool, but for the last token's: the manager counts pages.
            error = await refusal(live.client.generate(request(prompt=[1] * 100, max_tokens=29)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith("token_ids: needs 9 pages")

    asyncio.run(run())


def test_without_a_tokenizer_text_and_stop_strings_are_refused_and_ids_served():
    async def run():
        async with live_server(has_tokenizer=False) as live:
            error = await refusal(live.client.generate(request(prompt="hello")))
            assert error.details().startswith("text: ")
            error = await refusal(live.client.generate(request(stop=["x"])))
            assert error.details().startswith("stop: ")
            answer = await live.client.generate(request(max_tokens=5))
            assert (answer.token_ids, answer.text) == (echo(PROMPT, 5), "")

    asyncio.run(run())


def test_watch_interval_is_checked():
    async def run():
        async with live_server() as live:
            for interval_ms in (0, -1, 49, 60_001, 2**63 - 1):
                with pytest.raises(grpc.aio.AioRpcError, match="interval_ms: ") as caught:
                    async for _ in live.client.watch_groups(interval_ms):
                        pass
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())
