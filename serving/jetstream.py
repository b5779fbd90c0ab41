"""JetStream's `Orchestrator` over the same generation as loong.v1: for clients of that archived server.

A translation: the shortest one that its clients need. What it is not: JetStream's orchestration (slots, transfer).
"""

from __future__ import annotations

import grpc

from serving.client import generate_request
from serving.errors import InvalidField, answering
from serving.generator import Admitted, Generator
from serving.proto.jetstream import jetstream_pb2 as jetstream
from serving.proto.jetstream import jetstream_pb2_grpc
from serving.proto.loong.v1 import loong_pb2 as pb

SERVICE = jetstream.DESCRIPTOR.services_by_name["Orchestrator"].full_name
_DRAWN_AT = 1.0
"""Temperature of several samples: JetStream's requests have none, and greedy ones would all be the same."""


class OrchestratorServicer(jetstream_pb2_grpc.OrchestratorServicer):
    """Methods of jetstream_proto.Orchestrator over a Generator."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    @answering
    async def Decode(self, request: jetstream.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        translated = await self._translated(request)
        num_samples, as_text = max(1, request.num_samples), request.HasField("text_content")

        async def admitted(admitted: Admitted) -> None:
            await context.send_initial_metadata((("request-id", admitted.request_id),))

        async def write(messages: list[pb.GenerateResponse]) -> None:
            for message in messages:
                if message.HasField("tokens"):
                    await self._write(message.tokens, num_samples, as_text, context)

        await self._generator.generate(translated, admitted, write)

    @answering
    async def HealthCheck(
        self, request: jetstream.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> jetstream.HealthCheckResponse:
        return jetstream.HealthCheckResponse(is_live=self._generator.refusing is None)

    async def _translated(self, request: jetstream.DecodeRequest) -> pb.GenerateRequest:
        """Raises InvalidField."""
        for name in ("session_cache", "lora_adapter_id"):
            if getattr(request, name):
                raise InvalidField(name, "is not supported by this server")
        if request.num_samples < 0:
            raise InvalidField("num_samples", f"{request.num_samples} is negative")
        return generate_request(
            await self._prompt(request),
            max_tokens=request.max_tokens or None,
            n=request.num_samples or None,
            temperature=_DRAWN_AT if request.num_samples > 1 else None,
        )

    async def _prompt(self, request: jetstream.DecodeRequest) -> str | list[int]:
        """With a beginning-of-sequence token, whoever puts it there. Raises InvalidField."""
        tokenizer = self._generator.tokenizer
        if request.HasField("text_content"):
            text = request.text_content.text
            if request.has_bos and text:
                return await self._generator.tokenize(generate_request(text), add_special_tokens=False)
            return text
        if not request.HasField("token_content"):
            raise InvalidField("content", "give text_content or token_content")
        token_ids = list(request.token_content.token_ids)
        before = [] if tokenizer is None or request.has_bos else tokenizer.encode("")
        return token_ids if token_ids[: len(before)] == before or not token_ids else [*before, *token_ids]

    async def _write(
        self, tokens: pb.Tokens, num_samples: int, as_text: bool, context: grpc.aio.ServicerContext
    ) -> None:
        eos_ids = self._generator.limits.eos_ids
        token_ids = [token for token in tokens.token_ids if token not in eos_ids]
        text = tokens.text if as_text else ""
        if not token_ids and not text:
            return
        response = jetstream.DecodeResponse()
        samples = [response.stream_content.samples.add() for _ in range(num_samples)]
        samples[tokens.choice].token_ids.extend(token_ids)
        samples[tokens.choice].text = text
        await context.write(response)
