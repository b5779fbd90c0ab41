"""What clients send over HTTP: OpenAI's fields, and vLLM's beyond them, as pydantic models.

A field that is not here is refused by its name, and so is one whose value asks for what this server cannot do
(`_NEUTRAL`). What it is not: the checks of values (`serving/validation.py`, shared with gRPC) beyond what the messages
can carry.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import Field
from pydantic_core import from_json

from serving.errors import InvalidField

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
TokenIds = Annotated[list[Int32], Field(fail_fast=True)]
MAX_PROMPTS = 128
_MAX_KEYS = 64
_MAX_BIASES = 2048
# Pydantic tells every error it finds: of millions of wrong values it would make millions of words. So lists end at the
# first, and objects are bounded before they are looked into.

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "priority": (0,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields that are known, with the values (besides null) that ask for nothing."""

_SHAPES = {
    "prompt": "is no text, list of texts, list of token ids or list of lists of token ids",
    "stop": "is no text or list of texts",
    "content": "is no text or list of text parts",
    "guided_json": "is no JSON object or text of one",
    "json": "is no JSON object or text of one",
}
"""Of fields with several types: what to say, in place of what each of them says."""


def _bounded(most: int) -> pydantic.BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise pydantic_core.PydanticCustomError("too_many", "has more than {most} keys", {"most": most})
        return value

    return pydantic.BeforeValidator(check)


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Options = TypeVar("Options", bound=_Model)
Small = Annotated[Options, _bounded(_MAX_KEYS)]


class StreamOptions(_Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


JsonSchema = dict[str, Any]


class NamedSchema(_Model):
    """`strict` makes no difference: answers follow the schema always."""

    name: str | None = None
    description: str | None = None
    json_schema: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Small[NamedSchema] | None = None


class StructuredBody(_Model):
    """vLLM's `structured_outputs`."""

    json_: str | JsonSchema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None


class GenerationBody(_Model):
    """What both kinds of request have. None: not given."""

    model: str | None = None
    frequency_penalty: float | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    guided_json: str | JsonSchema | None = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[str, float] | None, _bounded(_MAX_BIASES)] = None
    max_tokens: Int64 | None = None
    metadata: Annotated[dict[str, str] | None, _bounded(_MAX_KEYS)] = None  # for the client's own books: not used
    min_p: float | None = None
    min_tokens: Int64 | None = None
    n: Int64 | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None  # not used
    repetition_penalty: float | None = None
    request_id: str | None = None
    response_format: Small[ResponseFormat] | None = None
    return_tokens_as_token_ids: bool | None = None
    safety_identifier: str | None = None  # not used
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: TokenIds | None = None
    stream: bool | None = None
    stream_options: Small[StreamOptions] | None = None
    structured_outputs: Small[StructuredBody] | None = None
    temperature: float | None = None
    top_k: Int64 | None = None
    top_p: float | None = None
    user: str | None = None  # not used


class CompletionBody(GenerationBody):
    prompt: Annotated[
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)],
        Field(union_mode="left_to_right"),
    ]
    echo: bool | None = None
    logprobs: Int64 | None = None


class TextPart(_Model):
    type: Literal["text"]
    text: str


class MessageBody(_Model):
    """The last ones are what clients send back of an earlier answer."""

    role: str
    content: str | Annotated[list[Small[TextPart]], Field(fail_fast=True)] | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


Messages = Annotated[list[Small[MessageBody]], Field(fail_fast=True)]


class ChatBody(GenerationBody):
    messages: Messages
    logprobs: bool | None = None
    max_completion_tokens: Int64 | None = None
    top_logprobs: Int64 | None = None


class TokenizeBody(_Model):
    """As vLLM has it: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Model):
    model: str | None = None
    tokens: TokenIds


Body = TypeVar("Body", bound=_Model)


def decoded(data: bytes, kind: type[Body]) -> Body:
    """The body of a request. Raises InvalidField."""
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidField("body", f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidField("body", "is no JSON object")
    if len(fields) > 2 * _MAX_KEYS:
        raise InvalidField("body", f"has more than {2 * _MAX_KEYS} keys")
    _drop_neutral(fields, kind)
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _refusal(error) from None


def _drop_neutral(fields: dict[str, Any], kind: type[_Model]) -> None:
    for name in _NEUTRAL.keys() & fields.keys() - kind.model_fields.keys():
        value = fields.pop(name)
        if value is not None and not any(type(value) is type(it) and value == it for it in _NEUTRAL[name]):
            raise InvalidField(name, "is not supported by this server")


def _refusal(error: pydantic.ValidationError) -> InvalidField:
    """What pydantic found first, by the name of the field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, message = "", f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
        if part in _SHAPES and not (part == "prompt" and first["type"] == "missing"):
            message = _SHAPES[part]
            break
    if first["type"] == "extra_forbidden":
        message = "is not a field that this server knows"
    return InvalidField(field[:200] or "body", message)
