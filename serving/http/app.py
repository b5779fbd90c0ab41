"""The routes of the HTTP listener, as a Starlette application: OpenAI's, vLLM's beside them, health, metrics.

A route reads a body, has it translated, and hands over; everything else is the gRPC service's too. What it is not: the
socket and the life cycle (`serving/http/server.py`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import loong_jax
from serving.context import take_trace_headers
from serving.errors import InvalidField, NotServing, Refusal
from serving.generator import Admitted, Generator
from serving.http import errors, translate
from serving.http.answers import Answer, ChatForm, CompletionForm, Form
from serving.http.config import HttpConfig
from serving.http.errors import UnknownModel, UnknownPath, WrongMethod
from serving.http.exchange import Bodies, ClientGone, Exchange, Out, event_data, together
from serving.http.schema import Body, ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody, decoded
from serving.proto.loong.v1 import loong_pb2 as pb

_MIN_BODY_BYTES = 1024 * 1024
_TOKEN_BYTES = 128


class Api:
    """The routes over a generator. `scrape` gives what /metrics says."""

    def __init__(self, generator: Generator, config: HttpConfig, scrape: Callable[[], Awaitable[bytes]]) -> None:
        self._scrape = scrape
        self._generator = generator
        self._config = config
        self._created_s = int(time.time())
        # Nothing else is answered while a body is decoded, 20 to 40 ms a megabyte: none is taken that no prompt needs.
        most = min(config.max_body_bytes, _MIN_BODY_BYTES + _TOKEN_BYTES * generator.limits.max_context_tokens)
        self._bodies = Bodies(max_bytes=most, max_total_bytes=config.max_bodies_bytes, timeout_s=config.body_timeout_s)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: _unrouted, Refusal: self._refused, ClientGone: _nobody}
        return Starlette(routes=routes, exception_handlers=handlers)  # pyright: ignore[reportArgumentType]

    # ------------------------------------------------------------------------------------------- generation

    async def completions(self, request: Request) -> Exchange:
        body = await self._body(request, CompletionBody)
        name = _request_id(request, body)
        form = CompletionForm(body, self._generator.tokenizer)
        return self._exchange(body, form, name, translate.completion_requests(body, form.prefix + name))

    async def chat(self, request: Request) -> Exchange:
        body = await self._body(request, ChatBody)
        name = _request_id(request, body)
        form = ChatForm(body, self._generator.tokenizer)
        return self._exchange(body, form, name, [translate.chat_request(body, form.prefix + name)])

    def _exchange(
        self, body: GenerationBody, form: Form, name: str, requests: Sequence[pb.GenerateRequest]
    ) -> Exchange:
        model = body.model or self._config.model_name
        answer = Answer(form, requests, id_=name, model=model, created_s=int(time.time()))
        work = self._events if body.stream else self._whole

        async def answering(out: Out) -> None:
            try:
                await work(out, body, requests, answer)
            except InvalidField as refusal:
                raise errors.in_body_names(refusal, chat=isinstance(body, ChatBody)) from None

        return Exchange(answering, [(b"x-request-id", name.encode())], self._config.write_timeout_s)

    async def _whole(
        self, out: Out, body: GenerationBody, requests: Sequence[pb.GenerateRequest], answer: Answer
    ) -> None:
        async def generate(prompt: int, request: pb.GenerateRequest) -> None:
            async def admitted(admitted: Admitted) -> None:
                answer.admitted(prompt, admitted)

            async def write(messages: list[pb.GenerateResponse]) -> None:
                answer.keep(prompt, messages)

            await self._generator.generate(request, admitted, write)

        await together([generate(prompt, request) for prompt, request in enumerate(requests)])
        await out.whole(answer.whole())

    async def _events(
        self, out: Out, body: GenerationBody, requests: Sequence[pb.GenerateRequest], answer: Answer
    ) -> None:
        """The first event waits for the first token: until then a refusal can still be a status."""
        writing = asyncio.Lock()
        options = body.stream_options

        async def generate(prompt: int, request: pb.GenerateRequest) -> None:
            async def admitted(admitted: Admitted) -> None:
                answer.admitted(prompt, admitted)

            async def write(messages: list[pb.GenerateResponse]) -> None:
                async with writing:
                    await out.event(*map(event_data, answer.chunks(prompt, messages, options)))

            await self._generator.generate(request, admitted, write)

        await together([generate(prompt, request) for prompt, request in enumerate(requests)])
        if options is not None and options.include_usage:
            await out.event(event_data(answer.last_chunk()))
        await out.done()

    # ------------------------------------------------------------------------------------------------ tokens

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        tokenizer, limits = self._generator.tokenizer, self._generator.limits
        if (body.prompt is None) == (body.messages is None):
            raise InvalidField("prompt", "give a prompt or messages")
        if body.messages is not None and body.add_special_tokens is not None:
            raise InvalidField("add_special_tokens", "the chat template says which there are")
        asked = pb.GenerateRequest(text=body.prompt)
        if body.messages is not None:
            asked = pb.GenerateRequest(messages=translate.messages(body.messages))
        try:
            tokens = await self._generator.tokenize(asked, add_special_tokens=body.add_special_tokens is not False)
        except InvalidField as refusal:
            raise errors.in_body_names(refusal, chat=True) from None
        answer = {"count": len(tokens), "max_model_len": limits.max_context_tokens, "tokens": tokens}
        if body.return_token_strs and tokenizer is not None:
            answer["token_strs"] = [tokenizer.shown(token) for token in tokens]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        return _json({"prompt": await self._generator.detokenize(body.tokens, "tokens")})

    # ------------------------------------------------------------------------------------------ about the server

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "loong",
            "root": self._config.model_root,
            "parent": None,
            "max_model_len": self._generator.limits.max_context_tokens,
        }

    async def health(self, request: Request) -> Response:
        """200 when requests are taken, else 503 with the reason."""
        self._generator.check_serving()
        return _json({"status": "serving"})

    async def version(self, request: Request) -> Response:
        return _json({"version": loong_jax.__version__})

    async def metrics(self, request: Request) -> Response:
        return Response(await self._scrape(), media_type=CONTENT_TYPE_LATEST)

    # ---------------------------------------------------------------------------------------------------- bodies

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        take_trace_headers(request.headers.items())
        body = decoded(await self._bodies.receive(request), kind)
        model = getattr(body, "model", None)
        if model is not None:
            self._check_model(model)
        return body

    async def _refused(self, request: Request, refusal: Exception) -> Response:
        """What is refused before the generator, which counts the rest, has seen it."""
        assert isinstance(refusal, Refusal)
        if request.method == "POST":
            self._generator.observers.refused(refusal)
        return _refusal(refusal)

    def _check_model(self, name: str) -> None:
        if name != self._config.model_name:
            raise UnknownModel(f"model: {name[:200]!r} is not served here; there is {self._config.model_name!r}")


def _request_id(request: Request, body: GenerationBody) -> str:
    """The name that the client gave, or a new one. Raises InvalidField."""
    given = body.request_id if body.request_id is not None else request.headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    translate.check_request_id(given)
    return given


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _refusal(refusal: Refusal) -> Response:
    headers = {name.decode(): value.decode() for name, value in errors.headers(refusal)}
    return JSONResponse(errors.body(refusal), errors.status(refusal), headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        return _refusal(WrongMethod(f"{request.method} {path}: another method is needed"))
    return _refusal(UnknownPath(f"{path}: there is nothing here"))


async def _nobody(request: Request, error: Exception) -> Response:
    return _refusal(NotServing("the client has gone"))
