"""The HTTP listener: uvicorn in the asyncio loop of the gRPC server, over the same generator.

What it is not: the routes (`serving/http/app.py`) or the process and its signals (`serving/launch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from serving.access import Access, TlsFiles
from serving.errors import PortTaken
from serving.generator import Generator
from serving.http.access import KeyMiddleware
from serving.http.app import Api
from serving.http.config import HttpConfig
from serving.http.metrics import Metrics
from serving.http.request_metrics import RequestMetrics
from serving.loop import EngineLoop

_MAX_HEADER_BYTES = 64 * 1024
_BACKLOG = 2048
_STOP_S = 2


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's affair."""
        yield


class HttpServer:
    """All methods belong to one asyncio loop. Whether requests are taken is the generator's to say. From now on the
    requests of every listener are counted, for /metrics."""

    def __init__(
        self,
        loop: EngineLoop,
        generator: Generator,
        config: HttpConfig,
        *,
        access: Access | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`access` None: no keys are asked for. `tls` None: plain text."""
        self._config = config
        limits = generator.limits
        requests = RequestMetrics(limits.max_context_tokens)
        generator.observers.add(requests)
        metrics = Metrics(loop.ask_state, requests, model_name=config.model_name, pool_tokens=limits.pool_tokens)
        app = Api(generator, config, metrics.scrape).app()
        self._server = _Server(
            uvicorn.Config(
                app if access is None else KeyMiddleware(app, access),
                ssl_context_factory=None if tls is None else lambda config, default: tls.context(),
                http="h11",  # bounds the headers
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=_STOP_S,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port. Raises PortTaken."""
        host, port = self._config.host.strip("[]"), self._config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise PortTaken(f"cannot listen on {host}:{port} for HTTP: {error}") from error
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.005)
        return listener.getsockname()[1]

    async def stop(self) -> None:
        """End: open exchanges are cut off after a moment."""
        if self._serving is None:
            return
        self._server.should_exit = True
        await self._serving
        self._serving = None
