"""The gRPC server: `loong.v1.Loong`, `grpc.health.v1`, reflection, on grpc.aio.

A servicer method hands over and streams. What it is not: the generation behind it (`serving/generator.py`),
the engine (`serving/loop.py`), or the table of status codes (`serving/errors.py`).
"""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.access import Access, TlsFiles
from serving.errors import PortTaken, answering
from serving.generator import Admitted, Generator
from serving.grpc_access import KeyInterceptor, server_credentials
from serving.loop import EngineLoop
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.proto.loong.v1 import loong_pb2_grpc
from serving.tokenizer import Tokenizer
from serving.validation import ValidationLimits, check_interval_ms

SERVICE = pb.DESCRIPTOR.services_by_name["Loong"].full_name
OPERATOR_METHODS = frozenset(f"/{SERVICE}/{name}" for name in ("Drain", "StartProfile", "StopProfile"))
"""They concern everybody: where there are keys, these need an operator's."""


class ServerConfig(msgspec.Struct, frozen=True):
    """Where and how to listen. `port` 0: any free port."""

    host: str = "127.0.0.1"
    port: int = 50051
    max_message_bytes: int = 64 * 1024 * 1024
    keepalive_ms: int = 30_000
    drain_s: float = 30.0  # streams still open this long after a drain began are cut off


class LoongServicer(loong_pb2_grpc.LoongServicer):
    """Methods of loong.v1.Loong over an EngineLoop."""

    def __init__(self, loop: EngineLoop, generator: Generator) -> None:
        self._loop = loop
        self._generator = generator

    @answering
    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async def admitted(admitted: Admitted) -> None:
            await context.send_initial_metadata((("request-id", admitted.request_id),))

        async def write(messages: list[pb.GenerateResponse]) -> None:
            for message in messages:
                await context.write(message)

        await self._generator.generate(request, admitted, write)

    @answering
    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        self._generator.abort(request.request_id)
        return pb.AbortResponse()

    @answering
    async def GetState(self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext) -> pb.State:
        return await asyncio.wrap_future(self._loop.ask_state())

    @answering
    async def WatchState(self, request: pb.WatchStateRequest, context: grpc.aio.ServicerContext) -> None:
        interval_s = check_interval_ms(request) / 1000
        while True:
            await context.write(await asyncio.wrap_future(self._loop.ask_state()))
            await asyncio.sleep(interval_s)


class LoongServer:
    """Listener, health and life cycle around a generator. All methods belong to one asyncio loop."""

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer | None,
        limits: ValidationLimits,
        config: ServerConfig,
        *,
        access: Access | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`access` None: no keys are asked for. `tls` None: plain text."""
        self._loop = loop
        self._config = config
        self._tls = tls
        self.generator = Generator(loop, tokenizer, limits)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server = grpc.aio.server(
            interceptors=() if access is None else (KeyInterceptor(access, OPERATOR_METHODS),),
            options=(
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.keepalive_time_ms", config.keepalive_ms),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            ),
        )
        loong_pb2_grpc.add_LoongServicer_to_server(LoongServicer(loop, self.generator), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, not yet ready; returns the port. Raises PortTaken."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        host = self._config.host.strip("[]")
        address = f"[{host}]:{self._config.port}" if ":" in host else f"{host}:{self._config.port}"
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, server_credentials(self._tls))
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        return port

    async def ready(self) -> None:
        """The minimal ladder is there: take requests."""
        self.generator.refusing = None
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def engine_lost(self, message: str) -> None:
        """The engine thread ended: health says so, streams have been told by their sinks."""
        self.generator.refusing = message
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Refuse new requests, let the running ones finish (for at most `drain_s`), then stop listening."""
        self.generator.refusing = "the server is draining"
        await self._health.enter_graceful_shutdown()
        self._loop.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.generator.idle(), self._config.drain_s)
        await self.stop()

    async def stop(self) -> None:
        """End at once."""
        await self._server.stop(None)
        self.generator.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)
