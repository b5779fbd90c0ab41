"""The gRPC surface over the fake engine: streams, cancel, abort, statuses, health, drain, crash."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.client import LoongClient, chat_messages, generate_request
from serving.loop import EngineLoop
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.server import SERVICE, ServerConfig
from tests.support.byte_tokenizer import BOS, EOS, byte_tokenizer
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_server import eventually, live_server

PROMPT = [5, 6, 7]
LONG = generate_request(PROMPT, max_tokens=2000)


def status(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> grpc.StatusCode:
    return error.value.code()


def test_tokens_logprobs_usage_and_dop_history():
    async def run():
        async with live_server() as live:
            answer = await live.client.generate(generate_request(PROMPT, max_tokens=7, seed=9, request_id="r-1"))
            assert answer.token_ids == echo(PROMPT, 7)
            assert answer.logprobs == [-float(token) for token in answer.token_ids]
            finished = answer.finished
            assert finished.finish_reason == pb.FINISH_REASON_LENGTH
            assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 7)
            assert (finished.request_id, finished.seed) == ("r-1", 9)
            runs = [(run.phase, run.dop, run.tokens) for run in finished.dop_history]
            assert runs == [(pb.PHASE_PREFILL, 4, 3), (pb.PHASE_DECODE, 2, 6)]

    asyncio.run(run())


def test_text_is_encoded_with_bos_and_comes_back_whole():
    async def run():
        async with live_server() as live:
            text = "héllo wörld €𝄞"
            num_bytes = len(text.encode())
            answer = await live.client.generate(generate_request(text, max_tokens=2 * num_bytes + 2))
            assert answer.finished.usage.prompt_tokens == num_bytes + 1
            assert answer.token_ids[0] == BOS
            assert answer.text == text * 2

    asyncio.run(run())


def test_messages_go_through_the_chat_template_and_no_special_token_is_added():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"

    async def run():
        async with live_server(tokenizer=byte_tokenizer(chat_template=template)) as live:
            expected = [BOS, *"[system]Be brief.[user]é?".encode(), EOS]
            messages = chat_messages("é?", "Be brief.")
            answer = await live.client.generate(generate_request(messages, max_tokens=len(expected), ignore_eos=True))
            assert answer.token_ids == expected
            assert answer.finished.usage.prompt_tokens == len(expected)

    asyncio.run(run())


def test_pieces_never_end_within_a_character():
    async def run():
        async with live_server(step_s=0.002) as live:
            pieces = [
                response.tokens
                async for response in live.client.responses(generate_request("€𝄞" * 3, max_tokens=40))
                if response.WhichOneof("event") == "tokens"
            ]
            assert len(pieces) > 10, "a slow engine streams"
            assert "".join(piece.text for piece in pieces[:-1]).isprintable()
            assert not any("\ufffd" in piece.text for piece in pieces[:-1])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "text", "num_tokens", "matched"),
    [
        ({"stop": ["lo w"]}, "hel", 8, "lo w"),
        ({"stop": ["zzz", "o", "ell"]}, "h", 5, "ell"),
        ({"stop": ["dh"]}, "hello worl", 14, "dh"),  # across the echo's seam and a special token
        ({"stop_token_ids": [ord("o")]}, "hell", 6, ""),
        ({"stop": ["never"]}, "hello worldhel", 16, ""),
        ({"stop": ["worldhelX"]}, "hello worldhel", 16, ""),  # held back to the end, then sent
    ],
)
def test_stops(fields, text, num_tokens, matched):
    async def run():
        async with live_server() as live:
            answer = await live.client.generate(generate_request("hello world", max_tokens=16, **fields))
            assert answer.text == text
            assert len(answer.token_ids) == answer.finished.usage.completion_tokens == num_tokens
            assert answer.finished.matched_stop == matched
            stopped = answer.finished.finish_reason == pb.FINISH_REASON_STOP
            assert stopped == (num_tokens < 16)
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())


def test_text_after_a_stop_string_is_never_sent_and_the_engine_is_told_what_to_keep():
    async def run():
        async with live_server(step_s=0.002) as live:
            request = generate_request("abcdefgh", max_tokens=1000, stop=["def"])
            answer = await live.client.generate(request)
            assert (answer.text, len(answer.token_ids)) == ("abc", 7)
            await eventually(lambda: not live.manager.running)
            assert live.manager.num_steps < 100, "the engine stopped too"

    asyncio.run(run())


def test_eos_ends_unless_ignored():
    async def run():
        async with live_server() as live:
            prompt = [65, 66, EOS, 67]
            answer = await live.client.generate(generate_request(prompt, max_tokens=10))
            assert (answer.token_ids, answer.text) == ([65, 66, EOS], "AB")
            assert answer.finished.finish_reason == pb.FINISH_REASON_STOP
            answer = await live.client.generate(generate_request(prompt, max_tokens=6, ignore_eos=True))
            assert (answer.token_ids, answer.text) == (echo(prompt, 6), "ABCAB")

    asyncio.run(run())


def test_seed_is_drawn_when_absent_and_reported():
    async def run():
        async with live_server() as live:
            request = generate_request(PROMPT, max_tokens=1, temperature=1.0)
            seeds = {(await live.client.generate(request)).finished.seed for _ in range(8)}
            assert len(seeds) > 1

    asyncio.run(run())


def test_a_cancelled_call_frees_its_pages_in_every_state():
    async def run():
        async with live_server(step_s=0.002) as live:
            running = live.client.stub.Generate(LONG)
            await running.read()
            assert live.manager.running
            running.cancel()
            await eventually(lambda: not live.manager.running)
            live.executor.running.clear()
            blocker = live.client.stub.Generate(LONG)
            await eventually(lambda: bool(live.manager.in_step))
            queued = live.client.stub.Generate(LONG)
            await eventually(lambda: len(live.manager.waiting) == 1)
            queued.cancel()
            await eventually(lambda: not live.manager.waiting)
            blocker.cancel()
            await eventually(lambda: not live.manager.running)
            live.executor.running.set()
            view = live.manager.view()
            assert all(instance.free_pages == instance.num_pages for instance in view.instances)
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=3))).token_ids == PROMPT

    asyncio.run(run())


def test_a_deadline_frees_pages_too():
    async def run():
        async with live_server(step_s=0.01) as live:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(LONG, timeout_s=0.2)
            assert status(error) is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())


def test_abort_ends_the_stream_with_its_reason():
    async def run():
        async with live_server(step_s=0.002) as live:
            request = generate_request(PROMPT, max_tokens=2000, request_id="to-abort")
            task = asyncio.create_task(live.client.generate(request))
            await eventually(lambda: bool(live.manager.running))
            await live.client.abort("to-abort")
            answer = await asyncio.wait_for(task, 60)
            assert answer.finished.finish_reason == pb.FINISH_REASON_ABORT
            assert answer.token_ids == echo(PROMPT, len(answer.token_ids))
            for unknown in ("to-abort", "never-was", ""):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await live.client.abort(unknown)
                assert status(error) is grpc.StatusCode.NOT_FOUND
                assert error.value.details().startswith("request_id: ")

    asyncio.run(run())


def test_a_request_id_in_use_is_refused_and_free_again_afterwards():
    async def run():
        async with live_server(step_s=0.002) as live:
            first = live.client.stub.Generate(generate_request(PROMPT, max_tokens=2000, request_id="same"))
            await first.read()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(generate_request(PROMPT, max_tokens=2, request_id="same"))
            assert status(error) is grpc.StatusCode.ALREADY_EXISTS
            assert error.value.details().startswith("request_id: ")
            assert (await first.read()).tokens.token_ids, "the first one goes on"
            first.cancel()
            await eventually(lambda: not live.manager.running)
            answer = await live.client.generate(generate_request(PROMPT, max_tokens=2, request_id="same"))
            assert answer.finished.request_id == "same"

    asyncio.run(run())


def test_the_request_id_is_echoed_in_the_initial_metadata():
    async def run():
        async with live_server() as live:
            call = live.client.stub.Generate(generate_request(PROMPT, max_tokens=2, request_id="mine"))
            assert dict(await call.initial_metadata())["request-id"] == "mine"
            call = live.client.stub.Generate(generate_request(PROMPT, max_tokens=2))
            made = dict(await call.initial_metadata())["request-id"]
            assert [m async for m in call][-1].finished.request_id == made

    asyncio.run(run())


def test_a_full_queue_is_resource_exhausted_with_a_hint():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=2)) as live:
            live.executor.running.clear()
            open_calls = [asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=3)))]
            await eventually(lambda: bool(live.manager.in_step))
            request = generate_request(PROMPT, max_tokens=3)
            open_calls += [asyncio.create_task(live.client.generate(request)) for _ in range(2)]
            await eventually(lambda: len(live.manager.waiting) == 2)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(request)
            assert status(error) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            live.executor.running.set()
            for answer in await asyncio.gather(*open_calls):
                assert answer.token_ids == PROMPT

    asyncio.run(run())


def test_a_full_inbox_is_resource_exhausted(monkeypatch):
    async def run():
        async with live_server() as live:
            monkeypatch.setattr(live.loop, "_max_inbox", 0)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(generate_request(PROMPT, max_tokens=3))
            assert status(error) is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(run())


def test_a_failed_step_ends_its_streams_and_no_others():
    async def run():
        async with live_server(step_s=0.002) as live:
            task = asyncio.create_task(live.client.generate(LONG))
            await eventually(lambda: bool(live.manager.running))
            live.executor.fail_next = True
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await asyncio.wait_for(task, 60)
            assert status(error) is grpc.StatusCode.INTERNAL
            assert "the test says so" in error.value.details()
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=3))).token_ids == PROMPT
            assert (await live.client.state()).counters.steps_failed == 1

    asyncio.run(run())


def test_a_crash_of_the_engine_ends_all_streams_and_turns_health():
    async def run():
        async with live_server(step_s=0.002) as live:
            tasks = [asyncio.create_task(live.client.generate(LONG)) for _ in range(3)]
            await eventually(lambda: len(live.manager.running) == 3)
            assert await live.client.is_ready()
            live.executor.raise_next = True
            for task in tasks:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await asyncio.wait_for(task, 60)
                assert status(error) is grpc.StatusCode.INTERNAL
                assert "the device fell off" in error.value.details()
            assert not await live.client.is_ready()
            for call in (live.client.generate(generate_request(PROMPT, max_tokens=1)), live.client.state()):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert status(error) in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)

    asyncio.run(run())


def test_not_serving_until_the_needed_programs_are_there():
    async def run():
        async with live_server(ready=False) as live:
            health = health_pb2_grpc.HealthStub(live.client._channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(generate_request(PROMPT, max_tokens=1))
            assert status(error) is grpc.StatusCode.UNAVAILABLE
            assert "warming up" in error.value.details()
            live.executor.become_ready()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=1))).token_ids == [5]

    asyncio.run(run())


def test_drain_refuses_new_requests_and_finishes_the_open_ones():
    async def run():
        async with live_server(step_s=0.002) as live:
            task = asyncio.create_task(live.client.generate(generate_request(PROMPT, max_tokens=200)))
            await eventually(lambda: bool(live.manager.running))
            drained = asyncio.create_task(live.server.drain())
            await eventually(lambda: live.manager.draining)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(generate_request(PROMPT, max_tokens=1))
            assert status(error) is grpc.StatusCode.UNAVAILABLE
            assert "draining" in error.value.details()
            assert not await live.client.is_ready()
            assert (await task).token_ids == echo(PROMPT, 200)
            await asyncio.wait_for(drained, 60)

    asyncio.run(run())


def test_drain_cuts_off_after_its_time():
    async def run():
        async with live_server(step_s=0.05, drain_s=0.2) as live:
            task = asyncio.create_task(live.client.generate(LONG))
            await eventually(lambda: bool(live.manager.running))
            await asyncio.wait_for(live.server.drain(), 60)
            with pytest.raises(grpc.aio.AioRpcError):
                await task
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())


def test_reflection_lists_the_services():
    async def run():
        from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

        async with live_server() as live:
            stub = reflection_pb2_grpc.ServerReflectionStub(live.client._channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            answer = await call.read()
            assert {s.name for s in answer.list_services_response.service} >= {SERVICE, "grpc.health.v1.Health"}

    asyncio.run(run())


def test_state_shows_groups_pools_and_counters():
    async def run():
        async with live_server(step_s=0.002) as live:
            tasks = [asyncio.create_task(live.client.generate(LONG)) for _ in range(3)]
            await eventually(lambda: len(live.manager.running) == 3)
            await asyncio.sleep(0.1)
            states = live.client.watch_groups(50)
            await anext(states)
            state = await anext(states)
            await states.aclose()
            (group,) = state.groups
            assert (group.phase, group.dop, group.requests) == (pb.PHASE_DECODE, 2, 3)
            assert list(group.instances) == [0, 1]
            assert group.tokens_per_s > 0
            assert state.ready
            assert not state.draining
            assert (state.requests_running, state.requests_waiting) == (3, 0)
            assert [i.pages_used for i in state.instances] == [501, 501, 501, 0]
            assert state.counters.scale_downs >= 1
            assert state.counters.tokens_prefilled == 9
            for task in tasks:
                task.cancel()

    asyncio.run(run())


def test_many_streams_at_once():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=10_000, pages=10_000)) as live:
            requests = [generate_request([i % 250, 7, 9], max_tokens=20) for i in range(300)]
            answers = await asyncio.gather(*(live.client.generate(request, 60) for request in requests))
            for request, answer in zip(requests, answers, strict=True):
                assert answer.token_ids == echo(list(request.token_ids.ids), 20)

    asyncio.run(run())


def test_a_port_in_use_is_said():
    async def run():
        from serving.server import LoongServer, PortTaken

        async with live_server() as live:
            port = int(live.client.target.rsplit(":", 1)[1])
            other = LoongServer(live.loop, None, live.limits, ServerConfig(port=port))
            with pytest.raises(PortTaken, match=str(port)):
                await other.start()
            await other.stop()

    asyncio.run(run())


def test_a_client_of_nobody_is_not_ready():
    async def run():
        async with LoongClient("127.0.0.1:1") as client:
            assert not await client.is_ready(timeout_s=0.5)
            with pytest.raises(TimeoutError):
                await client.wait_ready(0.2)

    asyncio.run(run())


def test_the_loop_must_be_started():
    from serving.errors import NotServing
    from serving.state import EngineState

    state = EngineState(kv_token_bytes=1, compiles_after_ready=lambda: 0)
    loop = EngineLoop(FakeManager(), state)
    with pytest.raises(NotServing):
        loop.ask_state()
    loop.close()


def test_choices_of_one_prompt_have_seeds_of_their_own_and_one_request_id():
    async def run():
        async with live_server() as live:
            request = generate_request(PROMPT, max_tokens=5, temperature=1.0, seed=2**32 - 2, n=4, request_id="four")
            answers = await live.client.generate_choices(request)
            assert [answer.token_ids for answer in answers] == [echo(PROMPT, 5)] * 4
            assert [answer.finished.seed for answer in answers] == [2**32 - 2, 2**32 - 1, 0, 1]
            assert {answer.finished.request_id for answer in answers} == {"four"}
            assert [answer.finished.choice for answer in answers] == [0, 1, 2, 3]
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())


def test_choices_end_each_at_its_own_stop_and_are_aborted_together():
    async def run():
        async with live_server(step_s=0.002) as live:
            answers = await live.client.generate_choices(
                generate_request("abcd", max_tokens=50, temperature=1.0, n=3, stop=["cd"])
            )
            assert [(answer.text, answer.finished.matched_stop) for answer in answers] == [("ab", "cd")] * 3
            await eventually(lambda: not live.manager.running)
            request = generate_request(PROMPT, max_tokens=2000, temperature=1.0, n=3, request_id="to-abort")
            task = asyncio.create_task(live.client.generate_choices(request))
            await eventually(lambda: len(live.manager.running) == 3)
            await live.client.abort("to-abort")
            reasons = [answer.finished.finish_reason for answer in await asyncio.wait_for(task, 60)]
            assert reasons == [pb.FINISH_REASON_ABORT] * 3

    asyncio.run(run())


def test_choices_are_cancelled_together_and_refused_together():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=2), step_s=0.002) as live:
            call = live.client.stub.Generate(generate_request(PROMPT, max_tokens=2000, temperature=1.0, n=2))
            await call.read()
            assert len(live.manager.running) == 2
            call.cancel()
            await eventually(lambda: not live.manager.running)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate_choices(generate_request(PROMPT, max_tokens=2000, temperature=1.0, n=5))
            assert status(error) is grpc.StatusCode.RESOURCE_EXHAUSTED
            await eventually(lambda: not live.manager.running and not live.manager.waiting)

    asyncio.run(run())


def test_logprobs_of_prompt_and_answer():
    async def run():
        async with live_server() as live:
            request = generate_request(PROMPT, max_tokens=2, top_logprobs=3, prompt_logprobs=2)
            answer = await live.client.generate(request)
            (scores,) = answer.prompt_logprobs
            assert (scores.first, list(scores.logprobs), scores.num_top) == (1, [-6.0, -7.0], 2)
            assert (list(scores.top_token_ids), list(scores.top_logprobs)) == ([6, 7, 7, 8], [-6, -7, -7, -8])
            assert [list(top.token_ids) for top in answer.top_logprobs] == [[5, 6, 7], [6, 7, 8]]
            assert [list(top.logprobs) for top in answer.top_logprobs] == [[-5, -6, -7], [-6, -7, -8]]
            plain = await live.client.generate(generate_request(PROMPT, max_tokens=2))
            assert not plain.top_logprobs
            assert not plain.prompt_logprobs

    asyncio.run(run())


def test_stop_strings_wait_for_min_tokens():
    async def run():
        async with live_server() as live:
            request = generate_request("abcd", max_tokens=50, stop=["bc"], min_tokens=6)
            answer = await live.client.generate(request)
            # a BOS token, abcd, and BOS again are six; the next "bc" ends it
            assert answer.text == "abcda"
            assert answer.finished.matched_stop == "bc"

    asyncio.run(run())
