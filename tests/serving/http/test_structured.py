"""Spellings of structured answers over HTTP: each is the one of gRPC."""

import json

import pytest

from serving.errors import InvalidField
from serving.http.schema import ChatBody, decoded
from serving.http.structured import structured
from serving.proto.loong.v1 import loong_pb2 as pb

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
COMPACT = {**SCHEMA, "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}}


def form(**fields) -> pb.StructuredOutput | None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return structured(decoded(json.dumps(body).encode(), ChatBody))


def openai(**schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, **schema}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
        ({"structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, pb.StructuredOutput(json_object=True)),
        (openai(schema=SCHEMA), pb.StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": SCHEMA}}, pb.StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": "{}"}}, pb.StructuredOutput(json_schema="{}")),
        ({"structured_outputs": {"json_object": True}}, pb.StructuredOutput(json_object=True)),
        ({"structured_outputs": {"regex": "a|b"}}, pb.StructuredOutput(regex="a|b")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, pb.StructuredOutput(choice=pb.Choices(texts=["a", "b"]))),
        ({"structured_outputs": {"grammar": "g"}}, pb.StructuredOutput(grammar="g")),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            pb.StructuredOutput(json_schema=json.dumps(COMPACT)),
        ),
        ({"guided_json": SCHEMA}, pb.StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"guided_regex": "a"}, pb.StructuredOutput(regex="a")),
        ({"guided_choice": ["a"]}, pb.StructuredOutput(choice=pb.Choices(texts=["a"]))),
        ({"guided_grammar": "g"}, pb.StructuredOutput(grammar="g")),
    ],
)
def test_spellings(fields, expected):
    assert form(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "text", "more": 1}}, "response_format.more"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs.disable"),
        ({"structured_outputs": {"json": "{", "disable_any_whitespace": True}}, "structured_outputs.json"),
    ],
)
def test_what_is_refused_is_named(fields, field):
    with pytest.raises(InvalidField) as error:
        form(**fields)
    assert error.value.field.startswith(field)
