"""The RPCs of loong.v1 beside the stream of Generate, over the fake engine; what metadata and details tell."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import loong_jax
from serving.client import chat_messages, generate_request
from serving.deadlines import Deadlines
from serving.device_trace import DeviceTrace
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.serving.test_deadlines import COST
from tests.support.byte_tokenizer import BOS, VOCAB_SIZE, byte_tokenizer
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_http import TEMPLATE
from tests.support.live_server import Live, eventually, live_server

PROMPT = [5, 6, 7]
LONG = generate_request(PROMPT, max_tokens=2000)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def refusal(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_the_unary_answer_is_the_streams():
    async def run():
        async with live_server() as live:
            request = generate_request(
                "hello", max_tokens=7, temperature=1.0, seed=3, n=2, top_logprobs=2, prompt_logprobs=1
            )
            streamed = await live.client.generate_choices(request)
            whole = await live.client.generate_unary(request)
            assert len(whole.answers) == 2
            for mine, theirs in zip(whole.answers, streamed, strict=True):
                assert (list(mine.tokens.token_ids), mine.tokens.text) == (theirs.token_ids, theirs.text)
                assert list(mine.tokens.top_logprobs) == theirs.top_logprobs
                assert mine.finished.usage == theirs.finished.usage
                assert mine.finished.choice == theirs.finished.choice == mine.tokens.choice
            assert list(whole.prompt_logprobs) == streamed[0].prompt_logprobs
            error = await refusal(live.client.generate_unary(generate_request([], max_tokens=1)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())


def test_a_unary_call_that_leaves_frees_its_pages():
    async def run():
        async with live_server(step_s=0.005) as live:
            error = await refusal(live.client.generate_unary(LONG, 0.2))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())


@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
def test_metadata_tell_the_id_usage_times_and_history(method):
    async def run():
        async with live_server(step_s=0.002) as live:
            call = getattr(live.client.stub, method)(generate_request(PROMPT, max_tokens=7, request_id="mine"))
            messages = [await call] if method == "GenerateUnary" else [message async for message in call]
            finished = messages[-1].answers[0].finished if method == "GenerateUnary" else messages[-1].finished
            assert dict(await call.initial_metadata())["request-id"] == "mine"
            trailing = dict(await call.trailing_metadata())
            assert (trailing["prompt-tokens"], trailing["completion-tokens"]) == ("3", "7")
            assert trailing["dop-history"] == "prefill:4x3 decode:2x6"
            queue_us, ttft_us, total_us = (int(trailing[name]) for name in ("queue-us", "ttft-us", "total-us"))
            assert 0 <= queue_us < queue_us + 2000 <= ttft_us < ttft_us + 6 * 2000 <= total_us
            assert finished.timing == pb.Timing(queue_us=queue_us, ttft_us=ttft_us, total_us=total_us)
            assert finished.dop_history[0].start_us == queue_us

    asyncio.run(run())


def test_the_time_in_the_queue_is_told():
    async def run():
        async with live_server() as live:
            live.executor.running.clear()
            blocker = asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=2)))
            await eventually(lambda: bool(live.manager.in_step))
            waiting = asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=2)))
            await eventually(lambda: len(live.manager.waiting) == 1)
            await asyncio.sleep(0.1)
            live.executor.running.set()
            await blocker
            timing = (await waiting).finished.timing
            assert 100_000 <= timing.queue_us <= timing.ttft_us <= timing.total_us

    asyncio.run(run())


def test_details_name_the_field_and_the_time_to_wait():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=1)) as live:
            error = await refusal(live.client.generate(generate_request(PROMPT, top_p=2.0, temperature=1.0)))
            status = rpc_status.from_call(error)
            bad = error_details_pb2.BadRequest()
            assert any(packed.Unpack(bad) for packed in status.details)
            assert bad.field_violations[0].field == "sampling.top_p"
            live.executor.running.clear()
            opened = [live.client.stub.Generate(generate_request(PROMPT, max_tokens=2))]
            await eventually(lambda: bool(live.manager.in_step))
            opened.append(live.client.stub.Generate(generate_request(PROMPT, max_tokens=2)))
            await eventually(lambda: len(live.manager.waiting) == 1)
            status = rpc_status.from_call(await refusal(live.client.generate(generate_request(PROMPT, max_tokens=2))))
            retry = error_details_pb2.RetryInfo()
            assert any(packed.Unpack(retry) for packed in status.details)
            assert retry.retry_delay.ToMilliseconds() > 0
            live.executor.running.set()

    asyncio.run(run())


def test_tokenize_and_detokenize():
    async def run():
        async with live_server(tokenizer=byte_tokenizer(chat_template=TEMPLATE)) as live:
            assert await live.client.tokenize("hé") == [BOS, *"hé".encode()]
            assert await live.client.tokenize("a", add_special_tokens=False) == [97]
            assert await live.client.tokenize("a", add_special_tokens=True) == [BOS, 97]
            assert await live.client.tokenize(chat_messages("hi")) == [BOS, *b"[user]hi"]
            assert await live.client.detokenize([BOS, *"hé".encode()]) == "hé"
            assert await live.client.detokenize([]) == ""
            for call, words in (
                (live.client.tokenize(""), "text: the prompt is empty"),
                (live.client.stub.Tokenize(pb.TokenizeRequest()), "prompt: give text or messages"),
                (live.client.tokenize(chat_messages("hi"), add_special_tokens=False), "add_special_tokens: "),
                (live.client.detokenize([VOCAB_SIZE]), f"token_ids: token {VOCAB_SIZE} at index 0"),
                (live.client.detokenize([-1]), "token_ids: token -1"),
                (live.client.detokenize([1] * 2049), "token_ids: 2049 tokens are more than the context of 2048"),
            ):
                error = await refusal(call)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert error.details().startswith(words), error.details()

    asyncio.run(run())


def test_models_and_loads():
    async def run():
        async with live_server() as live:
            (model,) = await live.client.models()
            assert model == pb.Model(
                name="echo",
                max_context_tokens=2048,
                vocab_size=VOCAB_SIZE,
                has_tokenizer=True,
                scores_prompts=True,
                version=loong_jax.__version__,
            )
            live.executor.running.clear()
            call = live.client.stub.Generate(generate_request(PROMPT, max_tokens=13))
            await eventually(lambda: bool(live.manager.in_step))
            loads = await live.client.loads()
            assert loads.serving
            assert (loads.requests_running, loads.max_running, loads.max_waiting) == (1, 64, 8)
            assert (loads.pool_tokens, loads.pool_tokens_used) == (4 * 256 * 4, 16)
            live.executor.running.set()
            call.cancel()

    asyncio.run(run())


def test_drain_returns_when_the_running_ones_have_ended_and_keeps_answering():
    async def run():
        async with live_server(step_s=0.002) as live:
            running = asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=200)))
            await eventually(lambda: bool(live.manager.running))
            early = await refusal(live.client.drain(0.02))
            assert early.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            drained = asyncio.create_task(live.client.drain())
            await eventually(lambda: live.manager.draining)
            assert not await live.client.is_ready()
            refused = await refusal(live.client.generate(generate_request(PROMPT, max_tokens=1)))
            assert (refused.code(), refused.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is draining")
            assert not drained.done()
            assert (await running).token_ids == echo(PROMPT, 200)
            await asyncio.wait_for(drained, 60)
            assert (await live.client.loads()).not_serving == "the server is draining"
            await live.client.drain(5)

    asyncio.run(run())


def test_profiles_are_the_operators_folders(tmp_path):
    async def run():
        calls: list[object] = []
        trace = DeviceTrace(tmp_path, calls.append, lambda: calls.append("stop"))
        async with live_server(trace=trace) as live:
            stub = live.client.stub
            name = (await stub.StartProfile(pb.StartProfileRequest())).name
            error = await refusal(stub.StartProfile(pb.StartProfileRequest()))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (await stub.StopProfile(pb.StopProfileRequest())).name == name
            assert calls == [tmp_path / name, "stop"]
            for duration_ms in (99, 600_001, -1, 0, 2**63 - 1):
                error = await refusal(stub.StartProfile(pb.StartProfileRequest(duration_ms=duration_ms)))
                assert error.details().startswith(f"duration_ms: {duration_ms} is not within")
            await stub.StartProfile(pb.StartProfileRequest())
        assert calls[-1] == "stop", "the end of the server ends it"
        async with live_server() as live:
            error = await refusal(live.client.stub.StartProfile(pb.StartProfileRequest()))
            assert error.details().startswith("profile-dir: ")

    asyncio.run(run())


def test_a_deadline_that_cannot_be_kept_is_refused_at_once():
    async def run():
        async with live_server(deadlines=Deadlines(COST, (1, 4))) as live:
            prompt = list(range(200)) * 10  # 5 s by that model
            before = live.manager.num_steps
            error = await refusal(live.client.generate(generate_request(prompt, max_tokens=1), 2.0))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert error.details().startswith("deadline: ")
            assert live.manager.num_steps == before, "nothing was begun"
            # 11 tokens take at least 1 s more, but only where no end can come before.
            short = generate_request(PROMPT, max_tokens=1000)
            assert len((await live.client.generate(short, 30)).token_ids) == 1000
            sure = generate_request(PROMPT, max_tokens=1000, ignore_eos=True)
            error = await refusal(live.client.generate(sure, 30))
            assert error.details().startswith("deadline: ")
            assert (await live.client.generate(generate_request(prompt, max_tokens=1))).token_ids == [0]

    asyncio.run(run())


async def watch_until(watch, status) -> None:
    while (await watch.read()).status != status:
        pass


async def stalls(live: Live, stall, go_on) -> None:
    watch = health_pb2_grpc.HealthStub(live.client._channel).Watch(health_pb2.HealthCheckRequest())
    await asyncio.wait_for(watch_until(watch, SERVING), 60)
    call = asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=400)))
    await eventually(lambda: bool(live.manager.running))
    stall()
    await asyncio.wait_for(watch_until(watch, NOT_SERVING), 60)
    error = await refusal(live.client.generate(generate_request(PROMPT, max_tokens=1)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "still" in error.details()
    go_on()
    await asyncio.wait_for(watch_until(watch, SERVING), 60)
    assert (await call).token_ids == echo(PROMPT, 400)
    assert (await live.client.generate(generate_request(PROMPT, max_tokens=1))).token_ids == [5]


def test_devices_that_stand_still_turn_health_until_they_go_on():
    async def run():
        async with live_server(step_s=0.001, stall_s=0.5) as live:
            await stalls(live, live.executor.running.clear, live.executor.running.set)

    asyncio.run(run())


def test_an_engine_thread_that_stands_still_turns_health_until_it_goes_on(monkeypatch):
    import threading

    async def run():
        async with live_server(step_s=0.001, stall_s=0.5) as live:
            goes_on, handle = threading.Event(), live.manager.handle
            goes_on.set()

            def held(event, now_us):
                goes_on.wait(20)
                return handle(event, now_us)

            monkeypatch.setattr(live.manager, "handle", held)
            await stalls(live, goes_on.clear, goes_on.set)

    asyncio.run(run())
