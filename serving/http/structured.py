"""The form of an answer in the spellings of OpenAI (`response_format`) and vLLM (`structured_outputs`, `guided_*`),
into the one of gRPC. What it is not: the check of the form (`serving/structured.py`).
"""

from __future__ import annotations

import json
from typing import Any

from serving.errors import InvalidField
from serving.http.schema import GenerationBody, JsonSchema, ResponseFormat, StructuredBody
from serving.proto.loong.v1 import loong_pb2 as pb


def structured(body: GenerationBody) -> pb.StructuredOutput | None:
    """None when any answer will do. Raises InvalidField."""
    given = [
        *_openai(body.response_format),
        *_vllm(body.structured_outputs),
        *_guided(body),
    ]
    if len(given) > 1:
        raise InvalidField(given[1][0], f"is one form too many beside {given[0][0]}")
    return given[0][1] if given else None


_Given = list[tuple[str, pb.StructuredOutput]]
"""By the name of the field."""


def _openai(form: ResponseFormat | None) -> _Given:
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [("response_format", pb.StructuredOutput(json_object=True))]
    if form.json_schema is None or form.json_schema.json_schema is None:
        raise InvalidField("response_format.json_schema.schema", "is missing")
    return [("response_format", _schema(form.json_schema.json_schema))]


def _vllm(body: StructuredBody | None) -> _Given:
    if body is None:
        return []
    given: _Given = []
    compact = bool(body.disable_any_whitespace)
    if body.json_ is not None:
        given.append(("structured_outputs.json", _schema(body.json_, compact=compact)))
    if body.json_object:
        form = _schema({"type": "object"}, compact=True) if compact else pb.StructuredOutput(json_object=True)
        given.append(("structured_outputs.json_object", form))
    if compact and not given:
        raise InvalidField("structured_outputs.disable_any_whitespace", "is for JSON only")
    return given + _others("structured_outputs.", body.regex, body.choice, body.grammar)


def _guided(body: GenerationBody) -> _Given:
    given: _Given = [] if body.guided_json is None else [("guided_json", _schema(body.guided_json))]
    return given + _others("guided_", body.guided_regex, body.guided_choice, body.guided_grammar)


def _others(prefix: str, regex: str | None, choice: list[str] | None, grammar: str | None) -> _Given:
    given: _Given = []
    if regex is not None:
        given.append((f"{prefix}regex", pb.StructuredOutput(regex=regex)))
    if choice is not None:
        given.append((f"{prefix}choice", pb.StructuredOutput(choice=pb.Choices(texts=choice))))
    if grammar is not None:
        given.append((f"{prefix}grammar", pb.StructuredOutput(grammar=grammar)))
    return given


def _schema(schema: str | JsonSchema, *, compact: bool = False) -> pb.StructuredOutput:
    if compact:
        schema = {**_parsed(schema), "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}}
    return pb.StructuredOutput(json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def _parsed(schema: str | JsonSchema) -> dict[str, Any]:
    if not isinstance(schema, str):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidField("structured_outputs.json", f"is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidField("structured_outputs.json", "is no JSON object")
    return parsed
