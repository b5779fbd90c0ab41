"""gRPC and HTTP give the same pieces, ends and failures."""

import asyncio
import json

import pytest

from loong_jax.config import ConfigError
from serving.bench.backends import Ask, BackendError, Ended, Got, GrpcBackend, HttpBackend
from serving.bench.prompts import Item
from serving.client import LoongClient
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.live_http import TEMPLATE, live_http

ASK = Ask(temperature=0.0, ignore_eos=True, model=None)


async def answer(backend, item):
    return [event async for event in backend.stream(item)]


def backends(live, chat=False):
    grpc = GrpcBackend(LoongClient(live.live.client.target), ASK)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return grpc, HttpBackend(live.url, path, {}, ASK._replace(chat=chat))


def test_both_count_tokens_and_tell_the_end():
    async def play():
        async with live_http() as live:
            for backend in backends(live):
                async with backend:
                    await backend.wait_ready(10)
                    *got, ended = await answer(backend, Item((65, 66), 2, 5))
                    over_http = isinstance(backend, HttpBackend)  # where an event counts as one, and may hold more
                    assert sum(piece.num_tokens for piece in got) == (len(got) if over_http else 5)
                    assert "".join(piece.text for piece in got) == "ABABA"
                    assert all(isinstance(piece, Got) for piece in got)
                    assert isinstance(ended, Ended)
                    assert (ended.num_prompt_tokens, ended.num_tokens, ended.finish_reason) == (2, 5, "length")
            assert (backend.model, backend.model_root) == ("echo", "loong")

    asyncio.run(play())


def test_grpc_tells_the_degrees_of_parallelism():
    async def play():
        async with live_http() as live, backends(live)[0] as backend:
            ended = (await answer(backend, Item("ab", 3, 4)))[-1]
            assert ended.dops == {("prefill", 4): 3, ("decode", 2): 3}

    asyncio.run(play())


def test_chat_counts_no_event_without_a_token():
    async def play():
        async with (
            live_http(tokenizer=byte_tokenizer(chat_template=TEMPLATE)) as live,
            backends(live, chat=True)[1] as backend,
        ):
            await backend.wait_ready(10)
            *got, ended = await answer(backend, Item("hello", 5, 3))
            assert 1 <= len(got) <= ended.num_tokens == 3
            assert "".join(piece.text for piece in got) != ""

    asyncio.run(play())


def test_refusals_are_the_servers_words():
    async def play():
        async with live_http() as live:
            for backend in backends(live):
                async with backend:
                    with pytest.raises(BackendError, match="max_tokens: "):
                        await answer(backend, Item((65,), 1, 1 << 20))
            async with HttpBackend(live.url, "/nothing", {}, ASK) as backend:
                with pytest.raises(BackendError, match="404: /nothing"):
                    await answer(backend, Item((65,), 1, 1))

    asyncio.run(play())


def test_nobody_listens():
    async def play():
        async with GrpcBackend(LoongClient("127.0.0.1:1"), ASK) as grpc:
            with pytest.raises(BackendError, match="UNAVAILABLE"):
                await answer(grpc, Item((1,), 1, 1))
            with pytest.raises(TimeoutError):
                await grpc.wait_ready(0.0)
        async with HttpBackend("http://127.0.0.1:1", "/v1/completions", {}, ASK) as http:
            with pytest.raises(BackendError, match="ConnectError"):
                await answer(http, Item((1,), 1, 1))
            with pytest.raises(TimeoutError):
                await http.wait_ready(0.0)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (['{"choices": [{"text": "a"}]}'], "ended before its end"),
        (['{"choices": [{"text": "a"}]}', '{"error": {"message": "fell over"}}'], "fell over"),
        (["{broken"], "JSONDecodeError"),
    ],
)
def test_answers_of_other_servers_that_break_off(events, words):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write("".join(f"data: {event}\n\n" for event in events).encode())
        writer.close()

    async def play():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with HttpBackend(f"http://127.0.0.1:{port}", "/x", {}, ASK) as backend:
                with pytest.raises(BackendError, match=words):
                    await answer(backend, Item((1,), 1, 1))

    asyncio.run(play())


def test_headers_and_the_named_model_are_sent():
    seen = []

    async def serve(reader, writer):
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        length = int(seen[0].lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        seen.append(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 401 No\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        writer.close()

    async def play():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with HttpBackend(url, "/x", {"authorization": "Bearer k"}, ASK._replace(model="m")) as backend:
                with pytest.raises(BackendError, match="401: no"):
                    await answer(backend, Item((1, 2), 2, 9))

    asyncio.run(play())
    assert b"authorization: Bearer k" in seen[0]
    assert (seen[1]["model"], seen[1]["prompt"], seen[1]["max_tokens"]) == ("m", [1, 2], 9)
    assert seen[1]["ignore_eos"] is True


def test_http_without_httpx_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(ConfigError, match=r"loong-jax\[bench\]"):
        HttpBackend("http://x", "/", {}, ASK)
