"""The gRPC server: `loong.v1.Loong`, JetStream's `Orchestrator`, `grpc.health.v1`, reflection, on grpc.aio.

A servicer method hands over and streams. What it is not: the generation behind it (`serving/generator.py`),
the engine (`serving/loop.py`), or the table of status codes (`serving/errors.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving import jetstream
from serving.about import Served, loads, models
from serving.access import Access, TlsFiles
from serving.backpressure import StreamLimits
from serving.context import take_trace_headers
from serving.deadlines import Deadlines
from serving.device_trace import DeviceTrace
from serving.errors import NotPossible, PortTaken, QueueFull, answering
from serving.gather import Gathered
from serving.generator import Admitted, Generator
from serving.grpc_access import KeyInterceptor, server_credentials
from serving.health import Readiness, Reason, Watchdog
from serving.jetstream import OrchestratorServicer
from serving.loop import EngineLoop
from serving.proto.jetstream import jetstream_pb2_grpc
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.proto.loong.v1 import loong_pb2_grpc
from serving.tokenizer import Tokenizer
from serving.validation import ValidationLimits, check_duration_ms, check_interval_ms, tokenize_request

_MAX_PENDING, _MAX_PENDING_S = 100_000, 600
_GC_ALLOCATIONS = 20_000
_REFUSABLE_STREAMS = 1024
"""Above `max_streams`, of one connection: they get our refusal, with its hint."""
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
    stall_s: float = 60.0  # an engine that has work and does none of it for so long is no longer serving
    max_connections: int = 8192
    max_watchers: int = 64
    streams: StreamLimits = StreamLimits()


def _admission(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """Channel arguments that leave admission to us.

    Calls that the library has received and Python has not taken yet are `pending`. From 1000 of them on it cancels new
    ones, the more the likelier, and all from 3000 on, and those that have waited for 30 s. Clients see CANCELLED, no
    reason and no hint. Here they wait until `Generate` refuses them; on one connection only so many may be open, and a
    client holds back the others.
    """
    per_connection = config.streams.max_streams + _REFUSABLE_STREAMS
    return (
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING),
        ("grpc.server_max_unrequested_time_in_server", _MAX_PENDING_S),
        ("grpc.max_concurrent_streams", per_connection),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
    )


def settle() -> None:
    """What has been loaded stays: from now on, no garbage collection looks at it or starts every few messages. Of the
    whole process, which is to serve and nothing else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS)


class LoongServicer(loong_pb2_grpc.LoongServicer):
    """Methods of loong.v1.Loong over an EngineLoop."""

    def __init__(
        self,
        loop: EngineLoop,
        generator: Generator,
        served: Served,
        trace: DeviceTrace,
        drain: Callable[[], Awaitable[None]],
        config: ServerConfig,
    ) -> None:
        """`drain` returns when no request is open any more."""
        self._loop = loop
        self._generator = generator
        self._served = served
        self._trace = trace
        self._drain = drain
        self._max_message_bytes = config.max_message_bytes
        self._max_watchers = config.max_watchers
        self._num_watchers = 0

    @answering
    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        gathered = Gathered()

        async def write(messages: list[pb.GenerateResponse]) -> None:
            for message in messages:
                await context.write(message)
            gathered.ends(messages[-1])

        await self._generate(request, context, write)
        context.set_trailing_metadata(gathered.trailing())

    @answering
    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        gathered = Gathered()

        async def write(messages: list[pb.GenerateResponse]) -> None:
            gathered.keep(messages)

        await self._generate(request, context, write)
        answer = gathered.whole()
        if answer.ByteSize() > self._max_message_bytes:
            raise NotPossible(f"the answer has more than {self._max_message_bytes} bytes; Generate sends it in pieces")
        context.set_trailing_metadata(gathered.trailing())
        return answer

    async def _generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        write: Callable[[list[pb.GenerateResponse]], Awaitable[None]],
    ) -> None:
        take_trace_headers(context.invocation_metadata() or ())

        async def admitted(admitted: Admitted) -> None:
            await context.send_initial_metadata((("request-id", admitted.request_id),))

        await self._generator.generate(request, admitted, write, left_s=context.time_remaining())

    @answering
    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        self._generator.abort(request.request_id)
        return pb.AbortResponse()

    @answering
    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await self._generator.tokenize(tokenize_request(request), add_special_tokens=adds)
        return pb.TokenizeResponse(token_ids=token_ids)

    @answering
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self._generator.detokenize(request.token_ids, "token_ids"))

    @answering
    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        return models(self._served, self._generator)

    @answering
    async def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext) -> pb.Loads:
        state = await asyncio.wrap_future(self._loop.ask_state())
        return loads(self._served, state, self._generator.refusing)

    @answering
    async def GetState(self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext) -> pb.State:
        return await asyncio.wrap_future(self._loop.ask_state())

    @answering
    async def WatchGroups(self, request: pb.WatchGroupsRequest, context: grpc.aio.ServicerContext) -> None:
        interval_s = check_interval_ms(request) / 1000
        if self._num_watchers >= self._max_watchers:
            raise QueueFull(f"{self._max_watchers} watch the state already")
        self._num_watchers += 1
        try:
            while True:
                await context.write(await asyncio.wrap_future(self._loop.ask_state()))
                await asyncio.sleep(interval_s)
        finally:
            self._num_watchers -= 1

    @answering
    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        await self._drain()
        return pb.DrainResponse()

    @answering
    async def StartProfile(
        self, request: pb.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartProfileResponse:
        return pb.StartProfileResponse(name=await self._trace.start(check_duration_ms(request) / 1000))

    @answering
    async def StopProfile(
        self, request: pb.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> pb.StopProfileResponse:
        return pb.StopProfileResponse(name=await self._trace.stop())


class LoongServer:
    """Listener, health and life cycle around a generator. All methods belong to one asyncio loop."""

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer | None,
        limits: ValidationLimits,
        config: ServerConfig,
        *,
        served: Served = Served(),
        deadlines: Deadlines | None = None,
        trace: DeviceTrace | None = None,
        access: Access | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`access` None: no keys are asked for. `tls` None: plain text."""
        self._loop = loop
        self._config = config
        self._tls = tls
        self._drains = False
        self._trace = trace or DeviceTrace(None)
        self.generator = Generator(loop, tokenizer, limits, deadlines, config.streams)
        self._readiness = Readiness((SERVICE, jetstream.SERVICE), self._refuse)
        self._watchdog = Watchdog(
            loop.progress,
            lambda message: self._readiness.holds(Reason.STALLED, message),
            lambda: self._readiness.is_over(Reason.STALLED),
            stall_s=config.stall_s,
        )
        self._watching: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=() if access is None else (KeyInterceptor(access, OPERATOR_METHODS),),
            options=(
                *_admission(config),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.keepalive_time_ms", config.keepalive_ms),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            ),
        )
        servicer = LoongServicer(loop, self.generator, served, self._trace, self._drain_requests, config)
        loong_pb2_grpc.add_LoongServicer_to_server(servicer, self._server)
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(OrchestratorServicer(self.generator), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._readiness.servicer, self._server)
        names = (SERVICE, jetstream.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, not yet ready; returns the port. Raises PortTaken."""
        await self._readiness.announce()
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
        self._watching = asyncio.create_task(self._watchdog.run())
        return port

    async def ready(self) -> None:
        """The minimal ladder is there: take requests."""
        await self._readiness.is_over(Reason.WARMING)

    async def engine_lost(self, message: str) -> None:
        """The engine thread ended: health says so, streams have been told by their sinks."""
        await self._readiness.holds(Reason.LOST, message)

    async def drain(self) -> None:
        """Refuse new requests, let the running ones finish (for at most `drain_s`), then stop listening."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drain_requests(), self._config.drain_s)
        await self.stop()

    async def stop(self) -> None:
        """End at once."""
        if self._watching is not None:
            self._watching.cancel()
        await self._server.stop(None)
        await self._trace.close()
        self.generator.close()

    async def _drain_requests(self) -> None:
        """Refuse new requests from now on; return when the running ones have finished."""
        if not self._drains:
            self._drains = True
            await self._readiness.holds(Reason.DRAINING, "the server is draining")
            self._loop.drain()
        await self.generator.idle()

    def _refuse(self, message: str | None) -> None:
        self.generator.refusing = message
