"""The whole of `loong serve`, as a process: a checkpoint, devices, gRPC, signals, the event log."""

import asyncio
import signal
import subprocess
import sys
import time

import grpc
import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from loong_jax.model.oracle import Oracle
from loong_jax.types import Adjustment
from serving import cli
from serving.client import Generation, LoongClient, generate_request
from tests.support import sampling_reference as reference
from tests.support.process import ROOT, Process, free_port
from tests.support.tiny_checkpoint import CONFIG, make_tiny_checkpoint

POOL_TOKENS = 2048  # an instance holds half
LADDER = ("--instances", "2", "--prefill-buckets", "128", "--decode-buckets", "8", "--platform", "cpu")
COMMON = (*LADDER, "--pool-tokens", str(POOL_TOKENS), "--max-running", "16")
PROMPT = [i * 37 % 250 for i in range(60)]
LONG_PROMPT = [i * 41 % 250 for i in range(1500)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return directory, make_tiny_checkpoint(directory)


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """(address, process, event log) of one server for all tests of this module."""
    out = tmp_path_factory.mktemp("served")
    port, http_port, log = free_port(), free_port(), out / "events.log"
    cache = str(ROOT / ".cache" / "test-serve")
    server = Process(
        out / "server.log",
        *("serve", str(checkpoint[0]), "--port", str(port), "--event-log", str(log), "--cache-dir", cache, *COMMON),
        *("--http-port", str(http_port), "--served-model-name", "tiny"),
    )
    try:
        server.wait_for("ready: ")
        yield f"127.0.0.1:{port}", server, log
    finally:
        server.end()


def answers(address: str, *requests) -> list[Generation]:
    async def run():
        async with LoongClient(address) as client:
            return await asyncio.gather(*(client.generate(request, 120) for request in requests))

    return asyncio.run(run())


def check_with_oracle(params, prompt: list[int], answer: Generation) -> None:
    """Each token is the likeliest one (or within 1e-3 of it) and has the oracle's logprob."""
    logprobs = Oracle(CONFIG, params).logprobs(np.array(prompt + answer.token_ids))
    rows = logprobs[len(prompt) - 1 : -1]
    theirs = rows[np.arange(len(rows)), answer.token_ids]
    np.testing.assert_allclose(answer.logprobs, theirs, atol=1e-4)
    assert (rows.max(-1) - theirs < 1e-3).all()


def test_tokens_are_the_oracles_alone_and_together(served, checkpoint):
    address, _, _ = served
    requests = [generate_request(p, max_tokens=12, ignore_eos=True) for p in (PROMPT, PROMPT[:7], LONG_PROMPT)]
    together = answers(address, *requests)
    for request, answer in zip(requests, together, strict=True):
        assert len(answer.token_ids) == 12
        check_with_oracle(checkpoint[1], list(request.token_ids.ids), answer)
        assert answers(address, request)[0].token_ids == answer.token_ids


def test_a_prompt_larger_than_an_instance_is_served_and_one_larger_than_the_pool_refused(served):
    address, _, _ = served
    (answer,) = answers(address, generate_request(LONG_PROMPT, max_tokens=4, ignore_eos=True))
    assert max(run.dop for run in answer.finished.dop_history) == 2
    with pytest.raises(grpc.aio.AioRpcError) as error:
        answers(address, generate_request([1] * (POOL_TOKENS + 1), max_tokens=1))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_http_gives_what_grpc_gives(served):
    """Tokens, log-probabilities of the answer and of an echoed prompt, and text, through OpenAI's shapes."""
    address, server, _ = served
    url = next(word for word in server.words().split() if word.startswith("http://"))
    request = generate_request(PROMPT, max_tokens=8, ignore_eos=True, top_logprobs=2, prompt_logprobs=2)
    (answer,) = answers(address, request)
    body = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0, "logprobs": 2,
        "echo": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    with httpx.Client(base_url=url, timeout=120) as client:
        assert client.get("/health").status_code == 200
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        refused = client.post("/v1/completions", json={"prompt": [1] * (POOL_TOKENS + 1)})
    table = choice["logprobs"]
    assert table["tokens"] == [f"token_id:{token}" for token in [*PROMPT, *answer.token_ids]]
    theirs = [value for part in answer.prompt_logprobs for value in part.logprobs] + answer.logprobs
    np.testing.assert_allclose(table["token_logprobs"][1:], theirs, atol=1e-4)
    assert all(len(top) in (2, 3) for top in table["top_logprobs"][1:])
    assert choice["text"].endswith(answer.text)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_sampling_repeats_with_its_seed_and_text_comes_back(served):
    address, _, _ = served
    request = generate_request("some text", max_tokens=16, temperature=1.0, seed=11, ignore_eos=True)
    first, second = answers(address, request, request)
    assert first.token_ids == second.token_ids
    other = answers(address, generate_request("some text", max_tokens=16, temperature=1.0, seed=12, ignore_eos=True))[0]
    assert other.token_ids != first.token_ids
    assert first.text


def test_every_kind_of_sampling_is_the_definitions(served, checkpoint):
    """Penalties, bans, biases, likeliest tokens; a prompt's own, by a program made when it is first wanted; choices."""
    address, _, _ = served
    oracle = Oracle(CONFIG, checkpoint[1])
    bias = {7: 3.0, 9: -100.0}
    request = generate_request(
        PROMPT, max_tokens=10, ignore_eos=True, presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.2,
        logit_bias=bias, min_tokens=5, stop_token_ids=[3, 4], top_logprobs=5, prompt_logprobs=2,
    )  # fmt: skip
    choices = generate_request(PROMPT, max_tokens=6, temperature=1.0, min_p=0.05, seed=5, n=3, ignore_eos=True)
    singles = [
        generate_request(PROMPT, max_tokens=6, temperature=1.0, min_p=0.05, seed=5 + i, ignore_eos=True)
        for i in range(3)
    ]

    async def run():
        async with LoongClient(address) as client:
            return await asyncio.gather(
                client.generate(request, 120), client.generate_choices(choices, 120),
                *(client.generate(single, 120) for single in singles),
            )  # fmt: skip

    answer, together, *alone = asyncio.run(run())
    assert [choice.token_ids for choice in together] == [other.token_ids for other in alone]
    assert len({tuple(choice.token_ids) for choice in together}) > 1

    rows = oracle.logits(np.array(PROMPT + answer.token_ids))
    raw = np.stack([reference.logprobs(row) for row in rows])
    adjustment = Adjustment(tuple(sorted(bias.items())), 5, 1.2, 0.7, 0.5)
    for index, token in enumerate(answer.token_ids):
        place = len(PROMPT) - 1 + index
        scores = reference.adjusted(rows[place], adjustment, PROMPT, answer.token_ids[:index], (3, 4))
        assert scores[token] > scores.max() - 1e-3
        np.testing.assert_allclose(answer.logprobs[index], raw[place, token], atol=1e-4)
        np.testing.assert_allclose(answer.top_logprobs[index].logprobs, np.sort(raw[place])[::-1][:5], atol=1e-4)
    assert [part.first for part in answer.prompt_logprobs] == [1]
    (scores,) = answer.prompt_logprobs
    theirs = raw[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(scores.logprobs, theirs, atol=1e-4)
    best = np.sort(raw[: len(PROMPT) - 1], axis=1)[:, ::-1][:, :2]
    np.testing.assert_allclose(np.reshape(scores.top_logprobs, (-1, 2)), best, atol=1e-4)


def test_a_cancelled_call_frees_its_pages(served):
    address, _, _ = served

    async def run():
        async with LoongClient(address) as client:
            call = client.stub.Generate(generate_request(PROMPT, max_tokens=1500, ignore_eos=True))
            await call.read()
            assert sum(i.pages_used for i in (await client.state()).instances) > 0
            call.cancel()
            for _ in range(200):
                if sum(i.pages_used for i in (await client.state()).instances) == 0:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("pages are still in use")

    asyncio.run(run())


def test_nothing_compiled_after_readiness_and_a_clean_end_whose_log_replays(served):
    address, server, log = served

    async def state():
        async with LoongClient(address) as client:
            return await client.state()

    assert asyncio.run(state()).counters.compiles_after_ready == 0
    assert server.end() == 0, server.words()
    assert "Traceback" not in server.words()
    replay = subprocess.run(
        [sys.executable, ROOT / "scripts" / "replay.py", log], capture_output=True, text=True, timeout=300, check=False
    )
    assert replay.returncode == 0, replay.stdout + replay.stderr


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("config.json", "{}")])
def test_a_broken_checkpoint_ends_with_its_name(tmp_path, name, content):
    make_tiny_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    done = CliRunner().invoke(cli.app, ["serve", str(tmp_path), "--port", "0", "--cache-dir", "none"])
    assert done.exit_code == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_tensors_that_are_broken_end_it_with_the_name_of_their_file(tmp_path):
    make_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    server = Process(
        tmp_path / "log", "serve", str(tmp_path), "--port", str(free_port()), "--cache-dir", "none", *COMMON
    )
    assert server.popen.wait(300) == 1
    assert "model.safetensors" in server.words()
    assert "Traceback" not in server.words()


def test_http_without_its_packages_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "serving.http.server", raising=False)
    done = CliRunner().invoke(cli.app, ["serve", str(checkpoint[0]), "--http-port", "1", "--port", "0"])
    assert (done.exit_code, "http-port: needs uvicorn; pip install 'loong-jax[http]'" in done.stderr) == (1, True)


def test_a_signal_while_loading_ends_at_once(checkpoint, tmp_path):
    server = Process(
        tmp_path / "log", "serve", str(checkpoint[0]), "--port", str(free_port()), "--cache-dir", "none", *COMMON
    )
    server.wait_for("listening")
    start_s = time.monotonic()
    assert server.end(signal.SIGINT) == 130
    assert time.monotonic() - start_s < 30
