"""Checks of a GenerateRequest: what passes here, the engine can serve; what does not is refused by the field's name.

What it is not: admission. Whether there is room now is the manager's affair (`Reject`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from loong_jax.types import Adjustment, Sampling
from serving.errors import InvalidField, TooLong
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.sampling_params import SamplingLimits, check_adjustment, check_lengths, check_sampling
from serving.structured import Form, StructuredLimits, check_form


class ValidationLimits(msgspec.Struct, frozen=True):
    """Bounds of a request. The first ones come from the model and the engine, the others are the operator's."""

    sampling: SamplingLimits
    max_position: int
    pool_tokens: int
    scores_prompts: bool = True
    eos_ids: tuple[int, ...] = ()
    default_max_tokens: int = 256
    max_text_bytes: int = 32 * 1024 * 1024
    max_messages: int = 4096
    max_role_chars: int = 64
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_ids: int = 64
    max_request_id_chars: int = 128
    max_choices: int = 64
    structured: StructuredLimits = StructuredLimits()

    @property
    def vocab_size(self) -> int:
        return self.sampling.vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Prompt and generated tokens of one request. The last generated token needs no room in the pool."""
        return min(self.max_position, self.pool_tokens + 1)


class Ask(msgspec.Struct, frozen=True):
    """A checked request, but for its prompt. `seed_given`: the client chose it."""

    prompt_field: str  # "text", "token_ids" or "messages"
    request_id: str  # "" when the server is to make one
    sampling: Sampling
    seed_given: bool
    max_tokens: int | None
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    num_choices: int
    adjustment: Adjustment | None
    num_prompt_top: int | None
    min_tokens: int
    form: Form | None = None


def check_request(
    request: pb.GenerateRequest, limits: ValidationLimits, *, has_tokenizer: bool, has_chat_template: bool
) -> Ask:
    """All checks that need no tokenizing. Raises InvalidField."""
    field = check_field(request, limits, has_tokenizer=has_tokenizer, has_chat_template=has_chat_template)
    sampling = check_sampling(request.sampling, limits.sampling)
    stop_ids = _check_stop_ids(request, limits)
    if request.HasField("max_tokens") and not 1 <= request.max_tokens <= limits.max_context_tokens:
        raise InvalidField("max_tokens", f"{request.max_tokens} is not within 1 to {limits.max_context_tokens}")
    return Ask(
        prompt_field=field,
        request_id=_check_request_id(request, limits),
        sampling=sampling,
        seed_given=request.sampling.HasField("seed"),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        stop_ids=stop_ids,
        stop=_check_stop(request.stop, limits, has_tokenizer),
        num_choices=_check_choices(request, sampling, limits),
        adjustment=check_adjustment(request.sampling, stop_ids, limits.sampling),
        num_prompt_top=_check_prompt_logprobs(request, limits),
        min_tokens=request.sampling.min_tokens,
        form=check_form(request, limits.structured),
    )


def check_field(
    request: pb.GenerateRequest, limits: ValidationLimits, *, has_tokenizer: bool, has_chat_template: bool
) -> str:
    """The field that holds the prompt, which can be tokenized. Raises InvalidField."""
    field = request.WhichOneof("prompt")
    if field is None:
        raise InvalidField("prompt", "give text or token_ids or messages")
    if field == "text":
        _check_text(request.text, limits, has_tokenizer)
    if field == "messages":
        _check_messages(request.messages.messages, limits, has_tokenizer, has_chat_template)
    return field


def check_tokens(token_ids: Sequence[int], field: str, limits: ValidationLimits) -> np.ndarray:
    """Tokens of the vocabulary. Raises InvalidField."""
    tokens = np.asarray(token_ids, np.int64)
    outside = np.flatnonzero((tokens < 0) | (tokens >= limits.vocab_size))
    if outside.size:
        index = int(outside[0])
        raise InvalidField(
            field, f"token {int(tokens[index])} at index {index} is outside the vocabulary of {limits.vocab_size}"
        )
    return tokens


def check_prompt(
    token_ids: Sequence[int], request: pb.GenerateRequest, ask: Ask, limits: ValidationLimits
) -> tuple[bytes, int]:
    """The prompt as TokenBytes, and the most tokens to generate. Raises InvalidField."""
    num_tokens = len(token_ids)
    if num_tokens == 0:
        raise InvalidField(ask.prompt_field, "the prompt is empty")
    if num_tokens > limits.pool_tokens:
        raise TooLong(
            ask.prompt_field,
            f"the prompt has {num_tokens} tokens; the pool of all instances holds {limits.pool_tokens}",
        )
    if num_tokens >= limits.max_position:
        raise TooLong(
            ask.prompt_field,
            f"the prompt has {num_tokens} tokens; the model's context of {limits.max_position} leaves no room for more",
        )
    tokens = check_tokens(token_ids, ask.prompt_field, limits)
    room = limits.max_context_tokens - num_tokens
    max_tokens = ask.max_tokens if ask.max_tokens is not None else min(limits.default_max_tokens, room)
    if max_tokens > room:
        raise TooLong(
            "max_tokens",
            f"{max_tokens} after a prompt of {num_tokens} tokens exceeds the context of {limits.max_context_tokens}",
        )
    check_lengths(request.sampling, ask.adjustment, ask.stop_ids, max_tokens, limits.sampling)
    return tokens.astype("<i4").tobytes(), max_tokens


def least_new_tokens(ask: Ask, max_tokens: int) -> int:
    """How many tokens the answer has at least, unless it is aborted."""
    if not ask.stop_ids and not ask.stop:
        return max_tokens
    return max(1, ask.min_tokens)


def tokenize_request(request: pb.TokenizeRequest) -> pb.GenerateRequest:
    """The same prompt, to be checked like any other. Raises InvalidField."""
    field = request.WhichOneof("prompt")
    if field is None:
        raise InvalidField("prompt", "give text or messages")
    if field == "messages" and request.HasField("add_special_tokens"):
        raise InvalidField("add_special_tokens", "the chat template says which there are")
    if field == "messages":
        return pb.GenerateRequest(messages=request.messages)
    return pb.GenerateRequest(text=request.text)


def check_duration_ms(request: pb.StartProfileRequest) -> int:
    """How long a profile may take. Raises InvalidField."""
    if not request.HasField("duration_ms"):
        return 10_000
    if not 100 <= request.duration_ms <= 600_000:
        raise InvalidField("duration_ms", f"{request.duration_ms} is not within 100 to 600000")
    return request.duration_ms


def check_interval_ms(request: pb.WatchGroupsRequest) -> int:
    """The interval of a WatchGroups call. Raises InvalidField."""
    if not request.HasField("interval_ms"):
        return 500
    if not 50 <= request.interval_ms <= 60_000:
        raise InvalidField("interval_ms", f"{request.interval_ms} is not within 50 to 60000")
    return request.interval_ms


def _check_text(text: str, limits: ValidationLimits, has_tokenizer: bool) -> None:
    if not has_tokenizer:
        raise InvalidField("text", "this model has no tokenizer.json; send token_ids")
    if not text:
        raise InvalidField("text", "the prompt is empty")
    # A code point takes at most four bytes: the exact size is only computed near the bound.
    if len(text) * 4 > limits.max_text_bytes and len(text.encode()) > limits.max_text_bytes:
        raise InvalidField("text", f"longer than {limits.max_text_bytes} bytes")


def _check_messages(
    messages: Sequence[pb.Message], limits: ValidationLimits, has_tokenizer: bool, has_chat_template: bool
) -> None:
    if not has_tokenizer:
        raise InvalidField("messages", "this model has no tokenizer.json; send token_ids")
    if not has_chat_template:
        raise InvalidField("messages", "this model has no chat template; send text")
    if not 1 <= len(messages) <= limits.max_messages:
        raise InvalidField("messages", f"{len(messages)} messages are not within 1 to {limits.max_messages}")
    for index, message in enumerate(messages):
        role = message.role
        if not (1 <= len(role) <= limits.max_role_chars and role.isprintable()):
            raise InvalidField(
                f"messages[{index}].role", f"must have 1 to {limits.max_role_chars} printable characters"
            )
    if sum(len(message.content.encode()) for message in messages) > limits.max_text_bytes:
        raise InvalidField("messages", f"longer than {limits.max_text_bytes} bytes")


def _check_choices(request: pb.GenerateRequest, sampling: Sampling, limits: ValidationLimits) -> int:
    num_choices = request.n if request.HasField("n") else 1
    if not 1 <= num_choices <= limits.max_choices:
        raise InvalidField("n", f"{num_choices} is not within 1 to {limits.max_choices}")
    if num_choices > 1 and sampling.temperature == 0:
        raise InvalidField("n", f"{num_choices} choices contradict greedy sampling (sampling.temperature is 0)")
    return num_choices


def _check_prompt_logprobs(request: pb.GenerateRequest, limits: ValidationLimits) -> int | None:
    if not request.HasField("prompt_logprobs"):
        return None
    if not 0 <= request.prompt_logprobs <= limits.sampling.max_top:
        raise InvalidField("prompt_logprobs", f"{request.prompt_logprobs} is not within 0 to {limits.sampling.max_top}")
    if not limits.scores_prompts:
        raise InvalidField("prompt_logprobs", "this server has no programs that score prompts")
    return request.prompt_logprobs


def _check_request_id(request: pb.GenerateRequest, limits: ValidationLimits) -> str:
    if not request.HasField("request_id"):
        return ""
    request_id = request.request_id
    if not 1 <= len(request_id) <= limits.max_request_id_chars:
        raise InvalidField(
            "request_id", f"{len(request_id)} characters are not within 1 to {limits.max_request_id_chars}"
        )
    # It is echoed in metadata, which carries printable ASCII.
    if not (request_id.isascii() and request_id.isprintable()) or request_id != request_id.strip():
        raise InvalidField("request_id", "must be printable ASCII without spaces around it")
    return request_id


def _check_stop_ids(request: pb.GenerateRequest, limits: ValidationLimits) -> tuple[int, ...]:
    if len(request.stop_token_ids) > limits.max_stop_ids:
        raise InvalidField(
            "stop_token_ids", f"{len(request.stop_token_ids)} are more than the limit of {limits.max_stop_ids}"
        )
    for index, token in enumerate(request.stop_token_ids):
        if not 0 <= token < limits.vocab_size:
            raise InvalidField(
                "stop_token_ids",
                f"token {token} at index {index} is outside the vocabulary of {limits.vocab_size}",
            )
        if request.ignore_eos and token in limits.eos_ids:
            raise InvalidField("stop_token_ids", f"end-of-sequence token {token} contradicts ignore_eos")
    eos_ids = () if request.ignore_eos else limits.eos_ids
    return tuple(dict.fromkeys((*eos_ids, *request.stop_token_ids)))


def _check_stop(stop: Sequence[str], limits: ValidationLimits, has_tokenizer: bool) -> tuple[str, ...]:
    if len(stop) > limits.max_stop_strings:
        raise InvalidField("stop", f"{len(stop)} strings are more than the limit of {limits.max_stop_strings}")
    if stop and not has_tokenizer:
        raise InvalidField("stop", "this model has no tokenizer.json; use stop_token_ids")
    for index, text in enumerate(stop):
        if not text:
            raise InvalidField("stop", f"the string at index {index} is empty")
        if len(text) > limits.max_stop_chars:
            raise InvalidField(
                "stop",
                f"the string at index {index} has {len(text)} characters; the limit is {limits.max_stop_chars}",
            )
    return tuple(dict.fromkeys(stop))
