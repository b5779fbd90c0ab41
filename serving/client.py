"""Typed asyncio client of loong.v1: what the CLI, the demo and the tests use. Speaks messages, not gRPC details.

Errors are grpc.aio.AioRpcError with the server's words; nothing is retried here.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc
import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loong_jax.config import ConfigError
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.proto.loong.v1 import loong_pb2_grpc


class Generation(msgspec.Struct):
    """A whole answer. `top_logprobs`: one for each token, `prompt_logprobs`: in order, where they were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: pb.Finished
    top_logprobs: list[pb.TopLogprobs]
    prompt_logprobs: list[pb.PromptLogprobs]


def generate_request(
    prompt: str | Sequence[int] | pb.Messages,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    min_p: float | None = None,
    min_tokens: int | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    top_logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    request_id: str | None = None,
    structured: pb.StructuredOutput | None = None,
) -> pb.GenerateRequest:
    """The request message; what is None is left to the server's default."""
    sampling = pb.SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        min_p=min_p,
        min_tokens=min_tokens,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
        top_logprobs=top_logprobs,
    )
    return pb.GenerateRequest(
        text=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str | pb.Messages) else pb.TokenIds(ids=prompt),
        messages=prompt if isinstance(prompt, pb.Messages) else None,
        request_id=request_id,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        n=n,
        prompt_logprobs=prompt_logprobs,
        structured=structured,
    )


def chat_messages(user: str, system: str | None = None) -> pb.Messages:
    """A conversation that begins."""
    turns = [] if system is None else [pb.Message(role="system", content=system)]
    return pb.Messages(messages=[*turns, pb.Message(role="user", content=user)])


class ClientIdentity(msgspec.Struct, frozen=True):
    """Who a client is, and whom it trusts. TLS is talked when `tls`, or a file for it, is given; without `tls_ca` the
    authorities of this machine are trusted."""

    api_key: str | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls-cert: goes with --tls-key")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api-key: must be printable ASCII")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of each call."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: plain text. Raises OSError."""
        if not (self.tls or self.tls_ca or self.tls_cert):
            return None
        ca, key, cert = (
            None if path is None else path.read_bytes() for path in (self.tls_ca, self.tls_key, self.tls_cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


class LoongClient:
    """One connection; an async context manager."""

    def __init__(
        self,
        target: str,
        *,
        identity: ClientIdentity = ClientIdentity(),
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """Raises OSError where a file of the identity cannot be read."""
        self.target = target
        self._metadata = identity.metadata
        options = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        )
        credentials = identity.credentials()
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self.stub = loong_pb2_grpc.LoongStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> LoongClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    async def responses(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncIterator[pb.GenerateResponse]:
        """All messages of an answer, `finished` last. Closing the iterator cancels the call."""
        call = self.stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()

    async def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> Generation:
        """The whole answer; of several choices, the first."""
        return (await self.generate_choices(request, timeout_s))[0]

    async def generate_choices(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> list[Generation]:
        """All choices of the answer, in their order."""
        # Not as many as were asked for: that number may be what the server refuses.
        answers = defaultdict[int, Generation](lambda: Generation([], [], "", pb.Finished(), [], []))
        async for response in self.responses(request, timeout_s):
            match response.WhichOneof("event"):
                case "tokens":
                    answer, tokens = answers[response.tokens.choice], response.tokens
                    answer.token_ids += tokens.token_ids
                    answer.logprobs += tokens.logprobs
                    answer.text += tokens.text
                    answer.top_logprobs += tokens.top_logprobs
                case "prompt_logprobs":
                    answers[0].prompt_logprobs.append(response.prompt_logprobs)
                case _:
                    answers[response.finished.choice].finished = response.finished
        return [answers[choice] for choice in sorted(answers)]

    async def abort(self, request_id: str) -> None:
        await self.stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata)

    async def state(self) -> pb.State:
        return await self.stub.GetState(pb.GetStateRequest(), metadata=self._metadata)

    async def watch_groups(self, interval_ms: int | None = None) -> AsyncIterator[pb.State]:
        request = pb.WatchGroupsRequest(interval_ms=interval_ms)
        async for state in self.stub.WatchGroups(request, metadata=self._metadata):
            yield state

    async def loads(self) -> pb.Loads:
        return await self.stub.GetLoads(pb.GetLoadsRequest(), metadata=self._metadata)

    async def models(self) -> list[pb.Model]:
        return list((await self.stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata)).models)

    async def tokenize(self, prompt: str | pb.Messages, *, add_special_tokens: bool | None = None) -> list[int]:
        request = pb.TokenizeRequest(
            text=prompt if isinstance(prompt, str) else None,
            messages=prompt if isinstance(prompt, pb.Messages) else None,
            add_special_tokens=add_special_tokens,
        )
        return list((await self.stub.Tokenize(request, metadata=self._metadata)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return (await self.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), metadata=self._metadata)).text

    async def generate_unary(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> pb.GenerateUnaryResponse:
        return await self.stub.GenerateUnary(request, timeout=timeout_s, metadata=self._metadata)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Return when no request is open any more. For operators."""
        await self.stub.Drain(pb.DrainRequest(), timeout=timeout_s, metadata=self._metadata)

    async def is_ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the health service says SERVING; False also when nobody listens."""
        try:
            answer = await self._health.Check(  # pyright: ignore[reportAttributeAccessIssue] (the stub sets it when made)
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the server is ready. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not await self.is_ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready within {timeout_s:g} s")
            await asyncio.sleep(0.1)
