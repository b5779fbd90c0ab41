"""Bodies within bounds; clients that leave, stall, or never finish what they say."""

import asyncio
import json

import pytest

from serving.http.config import HttpConfig
from tests.support.fake_engine import FakeManager
from tests.support.live_http import LiveHttp, live_http
from tests.support.live_server import eventually

LONG = {"prompt": "ab", "max_tokens": 1500}


def raw(live: LiveHttp, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: h", *headers, f"content-length: {length or len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def connected(live: LiveHttp) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = live.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_client_that_leaves_frees_its_request(stream, held):
    async def run():
        async with live_http(step_s=0.002) as live:
            if held:  # nothing has been sent yet
                live.live.executor.running.clear()
            reader, writer = await connected(live)
            writer.write(raw(live, json.dumps({**LONG, "stream": stream}).encode(), "content-type: application/json"))
            await eventually(lambda: len(live.live.manager.running) == 1)
            if stream and not held:
                await reader.readuntil(b"data: ")
            writer.close()
            await eventually(lambda: not live.live.manager.running)
            live.live.executor.running.set()
            await asyncio.wait_for(live.live.server.generator.idle(), 60)

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_cut_off():
    async def run():
        config = HttpConfig(port=0, model_name="echo", write_timeout_s=0.3)
        async with live_http(config, manager=FakeManager(max_waiting=64)) as live:
            # So much for each token that no buffer of a socket holds it.
            body = {"prompt": list(range(97, 117)), "n": 16, "max_tokens": 2000, "logprobs": 20, "stream": True}
            _, writer = await connected(live)
            writer.write(raw(live, json.dumps(body).encode(), "content-type: application/json"))
            await eventually(lambda: live.live.manager.num_steps > 20, 10)
            await asyncio.wait_for(live.live.server.generator.idle(), 60)
            assert (await live.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200
            writer.transport.abort()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"{}" * 600, ["content-type: application/json"], 413),
        (b"{}", [], 415),
        (b"{}", ["content-type: text/plain"], 415),
        (b"{}", ["content-type: application/json", "content-encoding: gzip"], 415),
        (b"{}", ["content-type: application/json; charset=utf-8"], 400),
    ],
)
def test_bodies_out_of_bounds(data, headers, status):
    async def run():
        async with live_http(HttpConfig(port=0, max_body_bytes=1024)) as live:
            reader, writer = await connected(live)
            writer.write(raw(live, data, *headers))
            assert (await reader.readuntil(b"\r\n")).split()[1] == str(status).encode()
            writer.close()

    asyncio.run(run())


def test_a_body_in_chunks_is_bounded_too_and_so_are_all_together():
    async def run():
        async with live_http(HttpConfig(port=0, max_body_bytes=1024)) as live:

            async def chunks():
                for _ in range(100):
                    yield b" " * 100

            json_type = {"content-type": "application/json"}
            response = await live.http.post("/v1/completions", content=chunks(), headers=json_type)
            assert response.status_code == 413
        async with live_http(HttpConfig(port=0, max_bodies_bytes=1024)) as live:
            response = await live.http.post("/v1/completions", content=b" " * 2000, headers=json_type)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert (await live.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200

    asyncio.run(run())


def test_no_body_is_larger_than_a_prompt_can_be():
    async def run():
        async with live_http() as live:  # 2,048 tokens of context
            for num_bytes, status in ((1_200_000, 400), (1_400_000, 413)):
                assert (await live.post("/v1/completions", prompt="a" * num_bytes)).status_code == status

    asyncio.run(run())


def test_a_body_that_does_not_come():
    async def run():
        async with live_http(HttpConfig(port=0, body_timeout_s=0.2)) as live:
            reader, writer = await connected(live)
            writer.write(raw(live, b"{", "content-type: application/json", length=50))
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)).split()[1] == b"408"
            writer.close()
            _, leaves = await connected(live)
            leaves.write(raw(live, b"{", "content-type: application/json", length=50))
            await asyncio.sleep(0.05)
            leaves.close()
            assert (await live.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200

    asyncio.run(run())
