"""Bounds on what clients make the server hold, by a client of bare frames that reads as it likes."""

import asyncio
import contextlib
from collections import Counter

import grpc
import pytest
from shell_load.http2 import Connection

from loong_jax.types import Emit
from serving.backpressure import StreamLimits, patient
from serving.client import generate_request
from serving.errors import SlowReader
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.server import ServerConfig
from serving.stream import RequestStream, StreamStart
from tests.support.fake_engine import FakeManager
from tests.support.live_server import eventually, live_server

GENERATE = "/loong.v1.Loong/Generate"
PROMPT = [5, 6, 7]
LONG = generate_request(PROMPT, max_tokens=2000).SerializeToString()
ONE = generate_request(PROMPT, max_tokens=1).SerializeToString()


async def received(*connections: Connection) -> None:
    """Take what comes on them, from now on."""
    for connection in connections:
        connection.socket.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.socket, connection.receive)


def test_a_burst_that_the_library_would_cancel_is_refused_with_a_hint():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=0)) as live:
            connection = Connection(live.port)
            # All at once, and nobody in this thread takes any of them: from 1,000 pending calls on the library cancels.
            streams = [connection.call(GENERATE, ONE) for _ in range(1600)]
            await received(connection)
            await eventually(lambda: not connection.streams, 60)
            assert Counter(stream.status for stream in streams) == {"8": 1600}
            assert all(int(stream.hint_ms or 0) > 0 for stream in streams)
            connection.close()

    asyncio.run(run())


def test_streams_beyond_the_bound_are_refused_and_room_comes_back():
    async def run():
        config = ServerConfig(port=0, streams=StreamLimits(max_streams=2))
        async with live_server(step_s=0.002, config=config) as live:
            calls = [live.client.stub.Generate(generate_request(PROMPT, max_tokens=2000)) for _ in range(2)]
            for call in calls:
                await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await live.client.generate(generate_request(PROMPT, max_tokens=1))
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.value.details() == "2 requests are open"
            assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            calls[0].cancel()
            await eventually(lambda: len(live.manager.running) == 1)
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=3))).token_ids == PROMPT

    asyncio.run(run())


def test_watchers_are_bounded():
    async def run():
        async with live_server(config=ServerConfig(port=0, max_watchers=1)) as live:
            watch, request = live.client.stub.WatchGroups, pb.WatchGroupsRequest(interval_ms=50)
            first = watch(request)
            await first.read()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await watch(request).read()
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            for _ in range(200):  # the server has heard of the end by and by
                with contextlib.suppress(grpc.aio.AioRpcError):
                    assert (await watch(request).read()).ready
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the watcher's place is not free again")

    asyncio.run(run())


@pytest.mark.parametrize("limits", [StreamLimits(write_timeout_s=0.3), StreamLimits(max_unread_tokens=10)])
def test_a_client_that_takes_nothing_is_cut_off_and_learns_it_when_it_reads(limits):
    async def run():
        async with live_server(step_s=0.002, config=ServerConfig(port=0, streams=limits)) as live:
            stalled = Connection(live.port, window_bytes=0)
            stream = stalled.call(GENERATE, LONG)
            await received(stalled)
            await eventually(lambda: len(live.manager.running) == 1)
            # Others are served while it stalls, and after it has been cut off its pages are free.
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=3))).token_ids == PROMPT
            await eventually(lambda: not live.manager.running, 10)
            assert all(instance.free_pages == instance.num_pages for instance in live.manager.view().instances)
            assert stream.status is None
            stalled.read(stream, 1 << 20)
            await eventually(lambda: stream.status is not None)
            assert (stream.status, stream.hint_ms) == ("8", None)
            stalled.close()

    asyncio.run(run())


def test_a_slow_reader_gets_many_tokens_a_message_and_all_of_them():
    async def run():
        async with live_server(step_s=0.001) as live:
            slow = Connection(live.port, window_bytes=0)
            messages = []
            stream = slow.call(GENERATE, generate_request(PROMPT, max_tokens=300).SerializeToString(), messages.append)
            await received(slow)
            await eventually(lambda: not live.manager.running and live.executor.submitted != [], 20)
            slow.read(stream, 1 << 20)
            await eventually(lambda: stream.status is not None)
            assert stream.status == "0"
            tokens = [list(pb.GenerateResponse.FromString(message).tokens.token_ids) for message in messages]
            assert sum(tokens, []) == PROMPT * 100
            assert len(tokens) <= 4, "one that was sent while it stalled, the rest, the last word"
            slow.close()

    asyncio.run(run())


def new_stream() -> RequestStream:
    return RequestStream(StreamStart("id", "token_ids", 3, 7, ()), None, ())


def test_many_tokens_alone_cut_nobody_off():
    """They may be there because this very thread was busy."""

    async def run():
        stream = new_stream()
        async with patient(StreamLimits(max_unread_tokens=1), [stream]) as patience:
            stream.put(Emit(0, 0, (1, 2, 3), (0.0, 0.0, 0.0), 1), 0)
            patience.began()
            stream.put(Emit(0, 3, (4, 5), (0.0, 0.0), 1), 0)
            await asyncio.sleep(0.01)
            patience.ended()
        assert stream.num_unread == 5

    asyncio.run(run())


def test_time_counts_from_the_write_that_waits():
    async def run():
        async with patient(StreamLimits(write_timeout_s=0.1), []) as patience:
            for _ in range(30):
                patience.began()
                await asyncio.sleep(0.01)
                patience.ended()
            patience.began()
            await asyncio.sleep(10)

    with pytest.raises(SlowReader, match="has read nothing"):
        asyncio.run(run())


def test_other_timeouts_pass_through():
    async def run():
        async with asyncio.timeout(0.01), patient(StreamLimits(), []) as patience:
            patience.began()
            await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        asyncio.run(run())
