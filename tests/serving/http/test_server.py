"""The socket: taken ports, large headers, the end."""

import asyncio
import socket

import pytest

from serving.errors import PortTaken
from serving.http.config import HttpConfig
from serving.http.server import HttpServer
from tests.support.live_http import live_http
from tests.support.live_server import eventually


def test_a_taken_port_is_an_error_with_its_number():
    async def run():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with live_http() as live:
                with pytest.raises(PortTaken, match=str(port)):
                    await HttpServer(live.live.loop, live.live.server.generator, HttpConfig(port=port)).start()

    asyncio.run(run())


def test_headers_are_bounded():
    async def run():
        async with live_http() as live:
            assert (await live.http.get("/version", headers={"x": "a" * 60_000})).status_code == 200
            reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rsplit(":")[-1]))
            writer.write(b"GET /version HTTP/1.1\r\nhost: h\r\nx: " + b"a" * 100_000)
            assert (await asyncio.wait_for(reader.readline(), 60)).split()[1] == b"400"
            writer.close()

    asyncio.run(run())


def test_draining_lets_answers_finish_and_refuses_new_ones():
    async def run():
        async with live_http(step_s=0.002) as live:
            running = asyncio.create_task(live.post("/v1/completions", prompt="ab", max_tokens=200))
            await eventually(lambda: len(live.live.manager.running) == 1)
            draining = asyncio.create_task(live.live.server.drain())
            await eventually(lambda: live.live.server.generator.refusing is not None)
            assert (await live.http.get("/health")).status_code == 503
            assert (await live.post("/v1/completions", prompt="a")).status_code == 503
            await draining
            assert (await running).json()["usage"]["completion_tokens"] == 200

    asyncio.run(run())


def test_the_end_cuts_open_streams_off_and_leaves_no_request():
    async def run():
        async with live_http(step_s=0.005) as live:
            async with live.http.stream(
                "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 2000, "stream": True}
            ) as response:
                lines = response.aiter_lines()
                await anext(lines)
                await live.server.stop()
            await eventually(lambda: not live.live.manager.running)

    asyncio.run(run())
