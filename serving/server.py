"""The gRPC server: `loong.v1.Loong`, `grpc.health.v1`, reflection, on grpc.aio.

A servicer method checks, hands over to the loop, and streams. What it is not: the engine (`serving/loop.py`), the
checks (`serving/validation.py`), or the table of status codes (`serving/errors.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.errors import DuplicateRequest, NotServing, UnknownRequest, answering
from serving.loop import EngineLoop
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.proto.loong.v1 import loong_pb2_grpc
from serving.sampling_params import MAX_SEED
from serving.stream import RequestStream, StreamStart
from serving.tokenizer import Tokenizer
from serving.validation import Ask, ValidationLimits, check_interval_ms, check_prompt, check_request

SERVICE = pb.DESCRIPTOR.services_by_name["Loong"].full_name


class PortTaken(Exception):
    """The address cannot be listened on."""


class ServerConfig(msgspec.Struct, frozen=True):
    """Where and how to listen. `port` 0: any free port."""

    host: str = "127.0.0.1"
    port: int = 50051
    max_message_bytes: int = 64 * 1024 * 1024
    keepalive_ms: int = 30_000
    drain_s: float = 30.0  # streams still open this long after a drain began are cut off


class LoongServicer(loong_pb2_grpc.LoongServicer):
    """Methods of loong.v1.Loong over an EngineLoop."""

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer | None, limits: ValidationLimits) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._limits = limits
        self._running: dict[str, range] = {}  # request_id -> numbers of its choices in the engine, none at first
        self._seeds = random.SystemRandom()
        # Encoding a long text takes long enough to be noticed by other streams.
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="loong-encode")
        # One renderer at a time; a template that takes long holds up no other text.
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loong-chat")
        self.refusing: str | None = "the server is warming up"
        """Why new requests are refused now, None when they are not."""

    # A streaming method is a coroutine that writes, not a generator: a cancelled call then always unwinds here, at
    # once, and never waits in a suspended generator for the garbage collector.

    @answering
    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        ask = check_request(
            request,
            self._limits,
            has_tokenizer=self._tokenizer is not None,
            has_chat_template=self._tokenizer is not None and self._tokenizer.has_chat_template,
        )
        if self.refusing is not None:
            raise NotServing(self.refusing)
        request_id = ask.request_id or uuid.uuid4().hex
        if request_id in self._running:
            raise DuplicateRequest(f"request_id: {request_id!r} is running")
        self._running[request_id] = range(0)
        try:
            await self._generate(request, ask, request_id, context)
        finally:
            del self._running[request_id]

    async def _generate(
        self, request: pb.GenerateRequest, ask: Ask, request_id: str, context: grpc.aio.ServicerContext
    ) -> None:
        token_ids = request.token_ids.ids if ask.prompt_field == "token_ids" else await self._encode(request)
        prompt, max_tokens = check_prompt(token_ids, request, ask, self._limits)
        streams = self._streams(ask, request_id, token_ids)
        first, *others = streams
        number = self._loop.arrive(
            prompt,
            max_tokens,
            msgspec.structs.replace(ask.sampling, seed=first.seed),
            ask.stop_ids,
            first,
            adjustment=ask.adjustment,
            num_prompt_top=ask.num_prompt_top,
            choices=[(msgspec.structs.replace(ask.sampling, seed=stream.seed), stream) for stream in others],
        )
        self._running[request_id] = range(number, number + len(streams))
        try:
            await context.send_initial_metadata((("request-id", request_id),))
            await self._write_all(number, streams, context)
        finally:
            # Cancelled, or the connection is gone: the engine frees its pages with the next event it handles. After
            # `stop_at` it has no effect.
            for choice, stream in enumerate(streams, number):
                if not stream.engine_done:
                    self._loop.abort(choice)

    def _streams(self, ask: Ask, request_id: str, token_ids: Sequence[int]) -> list[RequestStream]:
        """A stream for each choice, with a seed of its own."""
        seed = ask.sampling.seed if ask.seed_given else self._seeds.randint(0, MAX_SEED)
        return [
            RequestStream(
                StreamStart(
                    request_id,
                    ask.prompt_field,
                    len(token_ids),
                    (seed + choice) % (MAX_SEED + 1),
                    ask.stop_ids,
                    choice,
                    ask.min_tokens,
                ),
                self._tokenizer.detokenizer(token_ids) if self._tokenizer is not None else None,
                ask.stop,
            )
            for choice in range(ask.num_choices)
        ]

    async def _write_all(self, number: int, streams: list[RequestStream], context: grpc.aio.ServicerContext) -> None:
        """Write what the streams give, each in its order, until all are finished; the first refusal ends them all."""
        writing = asyncio.Lock()

        async def write(number: int, stream: RequestStream) -> None:
            while not stream.finished:
                messages = await stream.messages()
                if stream.stop_found and not stream.engine_done:
                    self._loop.stop_at(number, stream.num_tokens)
                async with writing:
                    for message in messages:
                        await context.write(message)

        if len(streams) == 1:
            return await write(number, streams[0])
        tasks = [asyncio.create_task(write(choice, stream)) for choice, stream in enumerate(streams, number)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _encode(self, request: pb.GenerateRequest) -> list[int]:
        assert self._tokenizer is not None, "check_request refuses text without a tokenizer"
        run = asyncio.get_running_loop().run_in_executor
        if request.WhichOneof("prompt") == "text":
            return await run(self._encoders, self._tokenizer.encode, request.text)
        messages = [(message.role, message.content) for message in request.messages.messages]
        text = await run(self._renderer, self._tokenizer.render_chat, messages, time.time())
        return await run(self._encoders, self._tokenizer.encode_chat, text)

    @answering
    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        numbers = self._running.get(request.request_id, range(0))
        if not numbers:
            raise UnknownRequest(f"request_id: {request.request_id[:200]!r} is not running")
        for number in numbers:
            self._loop.abort(number)
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

    def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()

    async def idle(self) -> None:
        """Wait until no Generate call is open."""
        while self._running:
            await asyncio.sleep(0.02)


class LoongServer:
    """Listener, health and life cycle around a servicer. All methods belong to one asyncio loop."""

    def __init__(
        self, loop: EngineLoop, tokenizer: Tokenizer | None, limits: ValidationLimits, config: ServerConfig
    ) -> None:
        self._loop = loop
        self._config = config
        self.servicer = LoongServicer(loop, tokenizer, limits)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.keepalive_time_ms", config.keepalive_ms),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            )
        )
        loong_pb2_grpc.add_LoongServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, not yet ready; returns the port. Raises PortTaken."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"{self._config.host}:{self._config.port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        return port

    async def ready(self) -> None:
        """The minimal ladder is there: take requests."""
        self.servicer.refusing = None
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def engine_lost(self, message: str) -> None:
        """The engine thread ended: health says so, streams have been told by their sinks."""
        self.servicer.refusing = message
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Refuse new requests, let the running ones finish (for at most `drain_s`), then stop listening."""
        self.servicer.refusing = "the server is draining"
        await self._health.enter_graceful_shutdown()
        self._loop.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.servicer.idle(), self._config.drain_s)
        await self.stop()

    async def stop(self) -> None:
        """End at once."""
        await self._server.stop(None)
        self.servicer.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)
