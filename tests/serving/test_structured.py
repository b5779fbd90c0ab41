"""Forms of answers: what is refused by which field, what compiles, and that compiling ends."""

import json

import pytest

from loong_jax.grammar import GrammarError, Grammars
from serving.client import generate_request
from serving.errors import InvalidField
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.structured import Form, StructuredLimits, StructuredOutputs, check_form, load_grammars
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, byte_level, save_byte_tokenizer

LIMITS = StructuredLimits(max_bytes=200, max_choices=3, cpu_s=1.0, memory_bytes=1024**3)
HANGS = '{"type": "integer", "multipleOf": 99999999}'
OBJECT = (
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}'
)


@pytest.fixture(scope="module")
def grammars():
    return Grammars(byte_level().to_str(), VOCAB_SIZE, (EOS,))


@pytest.fixture(scope="module")
def outputs(grammars):
    outputs = StructuredOutputs(grammars, LIMITS)
    yield outputs
    outputs.close()


def accepts(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether the whole text is an answer."""

    def fail(reason: str) -> None:
        raise AssertionError(reason)

    matcher = grammars.matcher(grammar, fail)
    for byte in (*text.encode(), EOS):
        words = matcher.allowed()
        if words is None or not (int(words[byte // 32]) >> (byte % 32)) & 1:
            return False
        matcher.take(byte)
    return True


def form_of(**form) -> Form | None:
    return check_form(generate_request([1], structured=pb.StructuredOutput(**form)), LIMITS)


def test_no_form_is_any_answer():
    assert check_form(generate_request([1]), LIMITS) is None


@pytest.mark.parametrize(
    ("field", "structured"),
    [
        ("structured", pb.StructuredOutput()),
        ("structured.json_schema", pb.StructuredOutput(json_schema="")),
        ("structured.json_schema", pb.StructuredOutput(json_schema="x" * 201)),
        ("structured.json_object", pb.StructuredOutput(json_object=False)),
        ("structured.regex", pb.StructuredOutput(regex="é" * 101)),
        ("structured.grammar", pb.StructuredOutput(grammar="")),
        ("structured.choice", pb.StructuredOutput(choice=pb.Choices())),
        ("structured.choice", pb.StructuredOutput(choice=pb.Choices(texts="abcd"))),
        ("structured.choice", pb.StructuredOutput(choice=pb.Choices(texts=["x" * 201]))),
    ],
)
def test_what_is_out_of_bounds_is_named(field, structured):
    with pytest.raises(InvalidField) as error:
        check_form(generate_request([1], structured=structured), LIMITS)
    assert error.value.field == field


@pytest.mark.parametrize(("field", "more"), [("ignore_eos", {"ignore_eos": True}), ("min_tokens", {"min_tokens": 1})])
def test_what_says_otherwise_where_an_answer_ends(field, more):
    with pytest.raises(InvalidField, match=r"contradicts structured\.regex") as error:
        check_form(generate_request([1], structured=pb.StructuredOutput(regex="a"), **more), LIMITS)
    assert error.value.field.endswith(field)


@pytest.mark.parametrize(
    ("form", "answers", "others"),
    [
        ({"json_schema": OBJECT}, ['{"a":1}', '{ "a": -20 }', '{\n  "a": 1\n}'], ['{"b":1}', "{}", '{"a":1} ', "1"]),
        ({"json_schema": "true"}, ["1", '"x"', "[null]"], ["x"]),
        ({"json_object": True}, ["{}", '{"x": [1, {"y": "z"}]}'], ["[]", "{"]),
        ({"regex": "a+|[0-9]{2}"}, ["aaa", "17"], ["", "1", "aab"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["(x"]),
        ({"grammar": 'root ::= "a" root | "b"'}, ["aab"], ["a"]),
        ({"choice": pb.Choices(texts=["yes", 'n"o', "é\n"])}, ["yes", 'n"o', "é\n"], ["no", "ye"]),
    ],
)
def test_forms_allow_their_answers_and_no_others(outputs, grammars, form, answers, others):
    grammar = outputs.grammar(form_of(**form))
    for text in answers:
        assert accepts(grammars, grammar, text), text
    for text in others:
        assert not accepts(grammars, grammar, text), text


def test_white_space_ends(outputs, grammars):
    grammar = outputs.grammar(form_of(json_schema=OBJECT))
    assert accepts(grammars, grammar, '{"a":' + " " * 40 + "1}")
    assert not accepts(grammars, grammar, '{"a":' + " " * 41 + "1}")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": "{"}, "Expecting property name"),
        ({"json_schema": "[]"}, "is no JSON object"),
        ({"json_schema": "false"}, "is no JSON object"),
        ({"json_schema": '{"not": {}}'}, "not"),
        ({"json_schema": '{"$ref": "http://127.0.0.1/x"}'}, "127.0.0.1"),
        ({"json_schema": HANGS}, "takes more than .* to compile"),  # time or memory, whichever ends first
        ({"regex": "(("}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreference"),
        ({"grammar": 'start: "a'}, "lexer error"),
        ({"grammar": "root ::= foo"}, "foo"),
    ],
)
def test_what_does_not_compile_is_refused_by_its_field(outputs, form, words):
    (field,) = form
    with pytest.raises(InvalidField, match=words) as error:
        outputs.grammar(form_of(**form))
    assert error.value.field == f"structured.{field}"
    assert len(str(error.value)) < 500
    assert outputs.grammar(form_of(regex="a")), "the next one is served"


def test_without_grammars_the_reason_is_told():
    with pytest.raises(InvalidField, match=r"structured\.regex: needs llguidance"):
        StructuredOutputs("needs llguidance", LIMITS).grammar(Form("regex", "a"))


def test_a_checkpoint_needs_a_tokenizer_and_an_end(tmp_path):
    with pytest.raises(GrammarError, match=r"no tokenizer\.json"):
        load_grammars(tmp_path, VOCAB_SIZE, (EOS,))
    save_byte_tokenizer(tmp_path)
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        load_grammars(tmp_path, VOCAB_SIZE, ())
    load_grammars(tmp_path, VOCAB_SIZE, (EOS,)).prepare("start: /a/")


def test_every_choice_is_taken_as_it_is(outputs, grammars):
    texts = ["a|b", ".*", "\\d"]
    grammar = outputs.grammar(form_of(choice=pb.Choices(texts=texts)))
    assert all(accepts(grammars, grammar, text) for text in texts)
    assert not accepts(grammars, grammar, json.dumps(texts[0]))
