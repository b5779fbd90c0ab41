"""Bodies into the GenerateRequests that gRPC takes: another spelling, the same meaning.

Where OpenAI's default is another than ours, it is written into the message (temperature 1, 16 tokens of a completion).
What it is not: the bodies (`serving/http/schema.py`) or the check of their values (`serving/validation.py`).
"""

from __future__ import annotations

import math

from serving.client import generate_request
from serving.errors import InvalidField
from serving.http.schema import MAX_PROMPTS, ChatBody, CompletionBody, GenerationBody, MessageBody
from serving.http.structured import structured
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.sampling_params import MAX_SEED

_COMPLETION_MAX_TOKENS = 16  # OpenAI's and vLLM's default
_MAX_REQUEST_ID_CHARS = 100  # room for what is put around it


def completion_requests(body: CompletionBody, request_id: str) -> list[pb.GenerateRequest]:
    """One for each prompt. Raises InvalidField."""
    prompts = _prompts(body)
    scores = body.logprobs is not None and bool(body.echo)
    if scores and body.stream and (body.n or 1) > 1:
        raise InvalidField("n", "log-probabilities of an echoed prompt are streamed for one choice only")
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise InvalidField("n", f"of {len(prompts)} prompts makes more than {MAX_PROMPTS} answers")
    max_tokens = body.max_tokens if body.max_tokens is not None else _COMPLETION_MAX_TOKENS
    requests = []
    for index, prompt in enumerate(prompts):
        request = _request(body, prompt, f"{request_id}-{index}" if len(prompts) > 1 else request_id)
        request.max_tokens = 1 if echoes_only(body) else max_tokens
        if body.logprobs is not None:
            request.sampling.top_logprobs = body.logprobs
            if body.echo:
                request.prompt_logprobs = body.logprobs
        requests.append(request)
    return requests


def echoes_only(body: CompletionBody) -> bool:
    """Only the prompt is wanted, for its log-probabilities: the engine generates a token, which is not sent."""
    return bool(body.echo) and body.max_tokens == 0


def chat_request(body: ChatBody, request_id: str) -> pb.GenerateRequest:
    """Raises InvalidField."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidField("top_logprobs", "needs logprobs: true")
    request = _request(body, messages(body.messages), request_id)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if max_tokens is not None:
        request.max_tokens = max_tokens
    if body.top_logprobs is not None:
        request.sampling.top_logprobs = body.top_logprobs
    return request


def messages(bodies: list[MessageBody]) -> pb.Messages:
    """Raises InvalidField."""
    return pb.Messages(messages=[pb.Message(role=it.role, content=_content(it, i)) for i, it in enumerate(bodies)])


def _content(message: MessageBody, index: int) -> str:
    if message.content is None:
        raise InvalidField(f"messages[{index}].content", "is missing")
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)  # as vLLM joins them


def check_request_id(request_id: str) -> None:
    """A name that the client gave. Raises InvalidField."""
    if not (1 <= len(request_id) <= _MAX_REQUEST_ID_CHARS and request_id.isascii() and request_id.isprintable()):
        raise InvalidField("request_id", f"must have 1 to {_MAX_REQUEST_ID_CHARS} printable ASCII characters")


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidField("prompt", "the prompt is empty")
    return [prompt] if isinstance(prompt[0], int) else prompt  # pyright: ignore[reportReturnType]


def _request(body: GenerationBody, prompt: str | list[int] | pb.Messages, request_id: str) -> pb.GenerateRequest:
    if body.stream_options is not None and not body.stream:
        raise InvalidField("stream_options", "needs stream: true")
    temperature = 1.0 if body.temperature is None else body.temperature
    top_k, top_p, min_p = _filters(body, temperature)
    return generate_request(
        prompt,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=None if body.seed is None else body.seed & MAX_SEED,  # ours have 32 bits, OpenAI's 64
        min_tokens=body.min_tokens,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        n=body.n,
        stop=(body.stop,) if isinstance(body.stop, str) else body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        request_id=request_id,
        structured=structured(body),
    )


def _filters(body: GenerationBody, temperature: float) -> tuple[int | None, float | None, float | None]:
    """top_k, top_p, min_p. Clients send them with temperature 0, too, where the likeliest token passes all of them."""
    top_k = 0 if body.top_k == -1 else body.top_k  # vLLM's older spelling of all
    if temperature != 0:
        return top_k, body.top_p, body.min_p
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise InvalidField("top_p", f"{body.top_p} is not above 0 and at most 1")
    if body.min_p is not None and not 0 <= body.min_p <= 1:
        raise InvalidField("min_p", f"{body.min_p} is not within 0 (off) to 1")
    if top_k is not None and top_k < 0:
        raise InvalidField("top_k", f"{top_k} is negative")
    return None, None, None


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    """Keys are numbers in quotes: JSON has no others."""
    result = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**31):
            raise InvalidField("logit_bias", f"{key[:40]!r} is no token id")
        if not math.isfinite(bias):
            raise InvalidField("logit_bias", f"{bias} of token {key} is no number")
        result[int(key)] = bias
    return result
