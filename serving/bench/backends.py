"""How a benchmark speaks to a server: loong.v1 over gRPC, or OpenAI's completions and chat over HTTP, streamed.

A backend yields what comes, when it comes; the clock is the runner's. What it is not: a client library: nothing is
retried. HTTP needs httpx (the extra `bench`), imported when it is used.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple, Protocol

from loong_jax.config import ConfigError
from serving.bench.prompts import Item
from serving.client import LoongClient, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb

NAMES = ("grpc", "openai", "openai-chat", "vllm")
"""As in `vllm bench serve`, where "vllm" is the same as "openai"; gRPC is ours."""


class Got(NamedTuple):
    """A piece of an answer: some tokens, at once."""

    num_tokens: int
    text: str


class Ended(NamedTuple):
    """The end of an answer: what the server counted, None where it did not say. `dops`: tokens by phase and DoP."""

    num_prompt_tokens: int | None
    num_tokens: int | None
    finish_reason: str
    dops: Mapping[tuple[str, int], int] = {}


class BackendError(Exception):
    """A request that failed; the message is the server's."""


class Ask(NamedTuple):
    """What is the same for all requests of a run."""

    temperature: float
    ignore_eos: bool
    model: str | None
    chat: bool = False


class Backend(Protocol):
    async def __aenter__(self) -> Backend: ...
    async def __aexit__(self, *exc_info: object) -> None: ...
    async def wait_ready(self, timeout_s: float) -> None:
        """Raises TimeoutError."""
        ...

    def stream(self, item: Item) -> AsyncIterator[Got | Ended]:
        """Raises BackendError."""
        ...


class GrpcBackend:
    """loong.v1 Generate."""

    def __init__(self, client: LoongClient, ask: Ask) -> None:
        self._client, self._ask = client, ask

    async def __aenter__(self) -> GrpcBackend:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.__aexit__(*exc_info)

    async def wait_ready(self, timeout_s: float) -> None:
        await self._client.wait_ready(timeout_s)

    async def stream(self, item: Item) -> AsyncIterator[Got | Ended]:
        import grpc

        request = generate_request(
            item.prompt,
            max_tokens=item.max_tokens,
            temperature=self._ask.temperature or None,
            ignore_eos=self._ask.ignore_eos,
        )
        try:
            async for response in self._client.responses(request):
                match response.WhichOneof("event"):
                    case "tokens":
                        yield Got(len(response.tokens.token_ids), response.tokens.text)
                    case "finished":
                        yield _ended(response.finished)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()  # pyright: ignore[reportAttributeAccessIssue]
            raise BackendError(f"{code}: {details}") from None


def _ended(finished: pb.Finished) -> Ended:
    dops: dict[tuple[str, int], int] = {}
    for run in finished.dop_history:
        key = (pb.Phase.Name(run.phase).removeprefix("PHASE_").lower(), run.dop)
        dops[key] = dops.get(key, 0) + run.tokens
    reason = pb.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Ended(finished.usage.prompt_tokens, finished.usage.completion_tokens, reason, dops)


class HttpBackend:
    """OpenAI's completions, or chat completions. An event counts as one token; how many there were, the usage says."""

    def __init__(self, base_url: str, endpoint: str, headers: Mapping[str, str], ask: Ask) -> None:
        """Raises ConfigError where httpx is missing."""
        try:
            import httpx
        except ModuleNotFoundError:
            raise ConfigError("backend: HTTP needs httpx; pip install 'loong-jax[bench]'") from None
        self._httpx = httpx
        # No proxies of the environment: what is measured is the server.
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=dict(headers),
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._endpoint, self._ask = endpoint, ask
        self.model = ask.model
        self.model_root: str | None = None

    async def __aenter__(self) -> HttpBackend:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def wait_ready(self, timeout_s: float) -> None:
        """Until /health is 200, or there is no such path. Then asks which model is served."""
        import asyncio
        import time

        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if (await self._http.get("/health", timeout=5.0)).status_code in (200, 404):
                    break
            except self._httpx.HTTPError:
                pass
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the server was not ready within {timeout_s:g} s")
            await asyncio.sleep(0.2)
        await self._ask_model()

    async def _ask_model(self) -> None:
        try:
            cards = (await self._http.get("/v1/models", timeout=5.0)).json()["data"]
            card = next(card for card in cards if self.model in (None, card["id"]))
            self.model, self.model_root = card["id"], card.get("root")
        except (self._httpx.HTTPError, LookupError, TypeError, ValueError, StopIteration):
            return  # another server's: the requests will tell

    async def stream(self, item: Item) -> AsyncIterator[Got | Ended]:
        reason, usage = "", {}
        try:
            async with self._http.stream("POST", self._endpoint, json=self._body(item)) as response:
                if response.status_code != 200:
                    raise BackendError(f"{response.status_code}: {_message(await response.aread())}")
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if not data or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise BackendError(_message(data.encode()))
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        reason = choice.get("finish_reason") or reason
                        text = self._text(choice)
                        if text is not None:
                            yield Got(1, text)
        except (self._httpx.HTTPError, ValueError, KeyError) as error:
            raise BackendError(f"{type(error).__name__}: {error}") from None
        if not reason:
            raise BackendError("the answer ended before its end")
        yield Ended(usage.get("prompt_tokens"), usage.get("completion_tokens"), reason)

    def _text(self, choice: dict[str, Any]) -> str | None:
        """None: no token came with this event."""
        if not self._ask.chat:
            return choice.get("text")
        delta = choice.get("delta") or {}
        return None if "role" in delta and not delta.get("content") else delta.get("content")

    def _body(self, item: Item) -> dict[str, Any]:
        body: dict[str, Any] = {
            "max_completion_tokens" if self._ask.chat else "max_tokens": item.max_tokens,
            "temperature": self._ask.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            body["model"] = self.model
        if self._ask.ignore_eos:
            body["ignore_eos"] = True
        if not self._ask.chat:
            return body | {"prompt": item.prompt if isinstance(item.prompt, str) else list(item.prompt)}
        return body | {"messages": [{"role": "user", "content": item.prompt}]}


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])[:500]
    except (LookupError, TypeError, ValueError):
        return content[:500].decode(errors="replace")
