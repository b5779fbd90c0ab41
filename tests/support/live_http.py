"""A real HTTP listener beside the gRPC one over the fake engine, and clients of it."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from serving.http.config import HttpConfig
from serving.http.server import HttpServer
from tests.support.live_server import Live, live_server

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


class LiveHttp:
    """`live` is the rest of the server; `http` a client of this part."""

    def __init__(self, live: Live, server: HttpServer, http: httpx.AsyncClient, url: str):
        self.live, self.server, self.http, self.url = live, server, http, url

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def events(self, path: str, **body: Any) -> list[Any]:
        """The data of all events, decoded but for [DONE]."""
        async with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            frames = (await response.aread()).decode().split("\n\n")
        assert frames[-1] == ""
        assert all(frame.startswith("data: ") for frame in frames[:-1])
        datas = [frame.removeprefix("data: ") for frame in frames[:-1]]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


@contextlib.asynccontextmanager
async def live_http(config: HttpConfig | None = None, **options: Any) -> AsyncIterator[LiveHttp]:
    """`options` are those of live_server."""
    async with live_server(**options) as live:
        server = HttpServer(
            live.loop,
            live.server.generator,
            config or HttpConfig(port=0, model_name="echo"),
            access=live.access,
            tls=live.tls,
        )
        port = await server.start()
        url = f"{'http' if live.tls is None else 'https'}://127.0.0.1:{port}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=120) as http:
                yield LiveHttp(live, server, http, url)
        finally:
            await server.stop()
