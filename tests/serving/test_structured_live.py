"""Structured answers of the model that comes with Loong, through the whole server: they parse, whatever the sampling,
beside rows that have no form; the log of it replays.
"""

import asyncio
import json
import re
import subprocess
import sys

import grpc
import httpx
import pytest

from serving.client import Generation, LoongClient, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.process import ROOT, Process, free_port

LADDER = ("--instances", "1", "--prefill-buckets", "128", "--decode-buckets", "8", "--platform", "cpu")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 300}, "maxItems": 3},
        "kind": {"enum": ["red", "blue", None]},
        "inner": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                  "additionalProperties": False},
    },
    "required": ["name", "sizes", "kind", "inner"],
    "additionalProperties": False,
}  # fmt: skip
KEY = "The sky is blue. The pass key is 48213. The sun is yellow.\nWhat is the pass key? The pass key is"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, URL, process, event log)."""
    out = tmp_path_factory.mktemp("structured")
    port, http_port, log = free_port(), free_port(), out / "events.log"
    server = Process(
        out / "server.log", "serve", "--port", str(port), "--http-port", str(http_port), "--event-log", str(log),
        "--cache-dir", str(ROOT / ".cache" / "test-serve"), "--pool-tokens", "4096", *LADDER,
    )  # fmt: skip
    try:
        server.wait_for("ready: ")
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{http_port}", server, log
    finally:
        server.end()


def answers(address: str, *requests) -> list[list[Generation]]:
    """The choices of each; all at once."""

    async def run():
        async with LoongClient(address) as client:
            return await asyncio.gather(*(client.generate_choices(request, 120) for request in requests))

    return asyncio.run(run())


def check_object(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"name", "sizes", "kind", "inner"}
    assert len(value["name"]) <= 8
    assert len(value["sizes"]) <= 3
    assert all(type(size) is int and -5 <= size <= 300 for size in value["sizes"])
    assert value["kind"] in ("red", "blue", None)
    assert type(value["inner"]["on"]) is bool


def test_answers_have_their_form_and_others_are_as_alone(served):
    address, *_ = served
    schema = pb.StructuredOutput(json_schema=json.dumps(SCHEMA))
    plain = generate_request(KEY, max_tokens=30, ignore_eos=True)
    penalised = generate_request(KEY, max_tokens=20, ignore_eos=True, repetition_penalty=1.3)
    forms = [
        generate_request(KEY, max_tokens=400, structured=schema),
        generate_request("x", max_tokens=400, structured=schema, temperature=1.0, seed=3, n=4),
        generate_request("y", max_tokens=400, structured=schema, temperature=5.0, seed=9, frequency_penalty=0.5),
        generate_request(KEY, max_tokens=400, structured=pb.StructuredOutput(regex="(ab|[0-9]{3})-x"), temperature=2.0),
        generate_request(KEY, max_tokens=400, structured=pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"]))),
        generate_request(
            KEY, structured=pb.StructuredOutput(grammar='start: "<" ("a" | "b") ">" [start]'), max_tokens=9
        ),
    ]
    alone = [answers(address, request)[0][0].token_ids for request in (plain, penalised, forms[0])]
    together = answers(address, plain, penalised, *forms)
    assert [choices[0].token_ids for choices in together[:3]] == alone
    greedy, four, hot, regex, choice, grammar = together[2:]
    for answer in (*greedy, *four, *hot):
        assert answer.finished.finish_reason == pb.FINISH_REASON_STOP
        check_object(answer.text)
    assert len({answer.text for answer in four}) > 1
    assert re.fullmatch("(ab|[0-9]{3})-x", regex[0].text)
    assert choice[0].text in ("yes", "no")
    assert re.match("<[ab]>", grammar[0].text)


def test_a_form_leaves_the_model_its_answer(served):
    address, *_ = served
    request = generate_request(KEY, max_tokens=20, structured=pb.StructuredOutput(regex=" [0-9]{5}"))
    ((answer,),) = answers(address, request)
    assert answer.text == " 48213"
    assert answer.finished.finish_reason == pb.FINISH_REASON_STOP


def test_a_form_that_does_not_compile_is_refused_by_its_field(served):
    address, url, *_ = served
    with pytest.raises(grpc.aio.AioRpcError) as error:
        answers(address, generate_request(KEY, structured=pb.StructuredOutput(regex="((")))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.value.details()).startswith("structured.regex: ")
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": KEY, "guided_regex": "(("}, timeout=60)
    assert refused.status_code == 400


def test_over_http(served):
    _, url, *_ = served
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    body = {"prompt": KEY, "max_tokens": 400, "response_format": form, "n": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    for choice in answer["choices"]:
        check_object(choice["text"])
        assert choice["finish_reason"] == "stop"
    body = {"prompt": [KEY], "max_tokens": 40, "structured_outputs": {"choice": ["one", "two"]}, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["text"] in ("one", "two")


def test_the_log_replays(served):
    _, _, server, log = served
    assert server.end() == 0, server.words()
    assert "Traceback" not in server.words()
    replay = subprocess.run(
        [sys.executable, ROOT / "scripts" / "replay.py", log], capture_output=True, text=True, timeout=300, check=False
    )
    assert replay.returncode == 0, replay.stdout + replay.stderr
