"""From a GenerateRequest to its messages, whoever asks: check, encode, hand to the engine, pass on what comes.

What it is not: a listener (`serving/server.py`), the checks themselves (`serving/validation.py`), or one choice's way
from tokens to text (`serving/stream.py`). It lives in the asyncio thread.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import msgspec

from loong_jax.types import Adjustment
from serving import context
from serving.backpressure import Patience, StreamLimits, patient
from serving.deadlines import Deadlines
from serving.errors import (
    DuplicateRequest,
    InvalidField,
    NotServing,
    QueueFull,
    Refusal,
    TooLong,
    UnknownRequest,
)
from serving.loop import EngineLoop
from serving.observers import Observers
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.sampling_params import MAX_SEED
from serving.stream import RequestStream, StreamStart
from serving.structured import StructuredOutputs
from serving.tokenizer import Tokenizer
from serving.validation import (
    Ask,
    ValidationLimits,
    check_field,
    check_prompt,
    check_request,
    check_tokens,
    least_new_tokens,
)

A = TypeVar("A")
B = TypeVar("B")
_MAX_COMPILING = 64
"""Requests that may wait for the form of their answers to compile."""


class Admitted(NamedTuple):
    """Told once, before the first message: the request has been handed to the engine."""

    request_id: str
    token_ids: Sequence[int]  # the prompt's


class Generator:
    """Generation over an EngineLoop. All methods belong to one asyncio loop."""

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer | None,
        limits: ValidationLimits,
        deadlines: Deadlines | None = None,
        stream_limits: StreamLimits = StreamLimits(),  # noqa: B008 (frozen)
    ) -> None:
        """`deadlines` None: nothing is known about how long answers take."""
        self._deadlines = deadlines
        self.tokenizer = tokenizer
        self.limits = limits
        self.stream_limits = stream_limits
        self.structured = StructuredOutputs("the engine is loading", limits.structured)
        self.observers = Observers()
        self.refusing: str | None = "the server is warming up"
        """Why new requests are refused now, None when they are not."""
        self._loop = loop
        # (caller, request_id) -> numbers of its choices in the engine, none at first. A name is its caller's: another
        # caller may use it too, and learns nothing of this one.
        self._running: dict[tuple[str, str], range] = {}
        self._seeds = random.SystemRandom()
        # Encoding a long text takes long enough to be noticed by other streams.
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="loong-encode")
        # One renderer at a time; a template that takes long holds up no other text.
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loong-chat")
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loong-grammar")
        self._num_compiling = 0

    async def generate(
        self,
        request: pb.GenerateRequest,
        admitted: Callable[[Admitted], Awaitable[None]],
        write: Callable[[list[pb.GenerateResponse]], Awaitable[None]],
        *,
        left_s: float | None = None,
    ) -> None:
        """Return when the last message has been written; cancelling it aborts the request. `write` gets what came
        since it was last called, and is never called twice at a time. `left_s`: until the caller's deadline. Raises
        Refusal, and what the two raise."""
        # A coroutine that writes, not a generator: when cancelled it always unwinds here, at once, and never waits in a
        # suspended generator for the garbage collector.
        arrived_us = self._loop.now_us()
        try:
            self._check_room()  # first: what is refused because there is too much of it must cost little
            ask = check_request(
                request,
                self.limits,
                has_tokenizer=self.tokenizer is not None,
                has_chat_template=self.has_chat_template,
            )
            self.check_serving()
            request_id = ask.request_id or uuid.uuid4().hex
            context.request_id.set(request_id)
            owned = (context.caller.get(), request_id)
            if owned in self._running:
                raise DuplicateRequest(f"request_id: {request_id!r} is running")
            self._running[owned] = range(0)
            try:
                await self._generate(request, ask, owned, arrived_us, admitted, write, left_s)
            finally:
                del self._running[owned]
        except Refusal as refusal:
            self.observers.refused(refusal)
            raise

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.has_chat_template

    def check_serving(self) -> None:
        """Raises NotServing while warming up or draining, and when the engine is lost."""
        if self.refusing is not None:
            raise NotServing(self.refusing)

    def _check_room(self) -> None:
        """Raises QueueFull."""
        most = self.stream_limits.max_streams
        if len(self._running) >= most:
            raise QueueFull(f"{most} requests are open")
        if (words := self._loop.full) is not None:
            raise QueueFull(words)

    def abort(self, request_id: str) -> None:
        """End a running request of the same caller. Raises UnknownRequest."""
        numbers = self._running.get((context.caller.get(), request_id), range(0))
        if not numbers:
            raise UnknownRequest(f"request_id: {request_id[:200]!r} is not running")
        for number in numbers:
            self._loop.abort(number)

    async def tokenize(self, request: pb.GenerateRequest, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Special tokens are the tokenizer's for text, the template's for messages. Raises
        InvalidField."""
        check_field(
            request,
            self.limits,
            has_tokenizer=self.tokenizer is not None,
            has_chat_template=self.has_chat_template,
        )
        if request.WhichOneof("prompt") == "text" and not add_special_tokens:
            assert self.tokenizer is not None, "check_field refuses text without a tokenizer"
            return await self._in_encoder(self.tokenizer.encode_chat, request.text)
        return await self._encode(request)

    async def detokenize(self, token_ids: Sequence[int], field: str) -> str:
        """Their text, without special tokens; `field` is the caller's name for them. Raises InvalidField."""
        if self.tokenizer is None:
            raise InvalidField(field, "this model has no tokenizer.json")
        most = self.limits.max_context_tokens
        if len(token_ids) > most:
            raise TooLong(field, f"{len(token_ids)} tokens are more than the context of {most}")
        check_tokens(token_ids, field, self.limits)
        return await self._in_encoder(self.tokenizer.decode, token_ids)

    async def _encode(self, request: pb.GenerateRequest) -> list[int]:
        """The token ids of a checked request's text or messages. Raises InvalidField."""
        assert self.tokenizer is not None, "check_request refuses text without a tokenizer"
        if request.WhichOneof("prompt") == "text":
            return await self._in_encoder(self.tokenizer.encode, request.text)
        messages = [(message.role, message.content) for message in request.messages.messages]
        run = asyncio.get_running_loop().run_in_executor
        text = await run(self._renderer, self.tokenizer.render_chat, messages, time.time())
        return await self._in_encoder(self.tokenizer.encode_chat, text)

    async def _in_encoder(self, work: Callable[[A], B], given: A) -> B:
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work, given)

    async def _adjustment(self, ask: Ask) -> Adjustment | None:
        """With the grammar of a structured answer. Raises InvalidField."""
        if ask.form is None:
            return ask.adjustment
        self.structured.check_available(ask.form)
        if self._num_compiling >= _MAX_COMPILING:
            raise QueueFull(f"{_MAX_COMPILING} requests wait for the form of their answers to compile")
        self._num_compiling += 1
        try:
            run = asyncio.get_running_loop().run_in_executor
            grammar = await run(self._compiler, self.structured.grammar, ask.form)
        finally:
            self._num_compiling -= 1
        return msgspec.structs.replace(ask.adjustment or Adjustment(), grammar=grammar)

    def close(self) -> None:
        self.structured.close()
        if self.tokenizer is not None:
            self.tokenizer.close()

    async def idle(self) -> None:
        """Wait until no request is open."""
        while self._running:
            await asyncio.sleep(0.02)

    async def _generate(
        self,
        request: pb.GenerateRequest,
        ask: Ask,
        owned: tuple[str, str],
        arrived_us: int,
        admitted: Callable[[Admitted], Awaitable[None]],
        write: Callable[[list[pb.GenerateResponse]], Awaitable[None]],
        left_s: float | None,
    ) -> None:
        _, request_id = owned
        token_ids = request.token_ids.ids if ask.prompt_field == "token_ids" else await self._encode(request)
        prompt, max_tokens = check_prompt(token_ids, request, ask, self.limits)
        adjustment = await self._adjustment(ask)
        if left_s is not None and self._deadlines is not None:
            left_s -= (self._loop.now_us() - arrived_us) / 1e6
            self._deadlines.check(left_s, len(token_ids), least_new_tokens(ask, max_tokens))
        streams = self._streams(request, ask, request_id, token_ids, arrived_us)
        first, *others = streams
        number = self._loop.arrive(
            prompt,
            max_tokens,
            msgspec.structs.replace(ask.sampling, seed=first.seed),
            ask.stop_ids,
            first,
            adjustment=adjustment,
            num_prompt_top=ask.num_prompt_top,
            choices=[(msgspec.structs.replace(ask.sampling, seed=stream.seed), stream) for stream in others],
            name=request_id,
        )
        self._running[owned] = range(number, number + len(streams))
        try:
            async with patient(self.stream_limits, streams) as patience:
                await admitted(Admitted(request_id, token_ids))
                await self._write_all(number, streams, write, patience)
        finally:
            # Cancelled, or the connection is gone: the engine frees its pages with the next event it handles. After
            # `stop_at` it has no effect.
            for choice, stream in enumerate(streams, number):
                if not stream.engine_done:
                    self._loop.abort(choice)
                stream.close()

    def _streams(
        self, request: pb.GenerateRequest, ask: Ask, request_id: str, token_ids: Sequence[int], arrived_us: int
    ) -> list[RequestStream]:
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
                    arrived_us,
                ),
                self.tokenizer.detokenizer(token_ids) if self.tokenizer is not None else None,
                ask.stop,
                self.observers.stream(request, arrived_us, len(token_ids)),
            )
            for choice in range(ask.num_choices)
        ]

    async def _write_all(
        self,
        number: int,
        streams: list[RequestStream],
        write: Callable[[list[pb.GenerateResponse]], Awaitable[None]],
        patience: Patience,
    ) -> None:
        """Write what the streams give, each in its order, until all are finished; the first refusal ends them all."""
        writing = asyncio.Lock()

        async def write_one(number: int, stream: RequestStream) -> None:
            while not stream.finished:
                messages = await stream.messages()
                if stream.stop_found and not stream.engine_done:
                    self._loop.stop_at(number, stream.num_tokens)
                if not messages:
                    continue
                if len(streams) > 1:
                    await writing.acquire()
                try:
                    patience.began()
                    await write(messages)
                    patience.ended()
                finally:
                    if len(streams) > 1:
                        writing.release()

        if len(streams) == 1:
            return await write_one(number, streams[0])
        tasks = [asyncio.create_task(write_one(choice, stream)) for choice, stream in enumerate(streams, number)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
