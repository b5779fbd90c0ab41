"""The routes over the fake engine, through a socket: shapes of answers and frames, refusals, ids, health."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loong_jax
from serving.http.config import HttpConfig
from serving.http.schema import CompletionBody
from tests.support.byte_tokenizer import BOS, EOS, byte_tokenizer
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_http import TEMPLATE, LiveHttp, live_http
from tests.support.live_server import eventually

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
HI_IDS = [BOS, *b"[user]hi"]


def served(test: Callable[[LiveHttp], Awaitable[None]], **options) -> None:
    async def run():
        tokenizer = options.pop("tokenizer", None) or byte_tokenizer(chat_template=TEMPLATE)
        async with live_http(tokenizer=tokenizer, **options) as live:
            await test(live)

    asyncio.run(run())


def test_a_completion():
    async def test(live: LiveHttp):
        response = await live.post(COMPLETIONS, model="echo", prompt="hey", max_tokens=6)
        assert response.status_code == 200
        body = response.json()
        name = response.headers["x-request-id"]
        assert isinstance(body.pop("created"), int)
        assert body == {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "model": "echo",
            "choices": [{"index": 0, "text": "heyh", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
            "usage": {
                "prompt_tokens": 4,
                "completion_tokens": 6,
                "total_tokens": 10,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    served(test)


def test_token_ids_batches_choices_and_stops():
    async def test(live: LiveHttp):
        ids = await live.post(COMPLETIONS, prompt=list(b"abc"), max_tokens=4)
        assert [it["text"] for it in ids.json()["choices"]] == ["abca"]
        batch = await live.post(COMPLETIONS, prompt=[list(b"ab"), list(b"xyz")], n=2, max_tokens=3)
        assert [(it["index"], it["text"]) for it in batch.json()["choices"]] == [
            (0, "aba"), (1, "aba"), (2, "xyz"), (3, "xyz"),
        ]  # fmt: skip
        stop = (await live.post(COMPLETIONS, prompt="hello", stop="lo", max_tokens=12)).json()["choices"][0]
        assert (stop["text"], stop["finish_reason"], stop["stop_reason"]) == ("hel", "stop", "lo")
        eos = (await live.post(COMPLETIONS, prompt=[104, 105, EOS], max_tokens=12)).json()["choices"][0]
        assert (eos["text"], eos["finish_reason"], eos["stop_reason"]) == ("hi", "stop", None)

    served(test)


def test_an_echo_has_the_log_probabilities_of_the_prompt_as_lm_eval_reads_them():
    async def test(live: LiveHttp):
        prompt = list(b"abcd")
        response = await live.post(COMPLETIONS, prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)
        choice = response.json()["choices"][0]
        table = choice["logprobs"]
        assert choice["text"] == "abcda"
        assert table["tokens"] == ["a", "b", "c", "d", "a"]
        assert table["token_logprobs"] == [None, -98.0, -99.0, -100.0, -97.0]
        assert table["top_logprobs"] == [None, {"b": -98.0}, {"c": -99.0}, {"d": -100.0}, {"a": -97.0}]
        assert table["text_offset"] == [0, 1, 2, 3, 4]

    served(test)


def test_a_chat():
    async def test(live: LiveHttp):
        response = await live.post(CHAT, messages=HI, max_completion_tokens=3, logprobs=True, top_logprobs=2)
        body = response.json()
        assert (body["object"], body["id"][:9]) == ("chat.completion", "chatcmpl-")
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": "[u", "refusal": None}
        content = choice["logprobs"]["content"]
        assert [(it["token"], it["logprob"], it["bytes"]) for it in content[1:]] == [
            ("[", -91.0, [91]), ("u", -117.0, [117]),
        ]  # fmt: skip
        assert [it["token"] for it in content[1]["top_logprobs"]] == ["[", "\\"]
        assert body["usage"]["prompt_tokens"] == len(HI_IDS)

    served(test)


def test_frames_of_a_completion_one_for_each_token_and_the_reason_with_the_last():
    async def test(live: LiveHttp):
        *frames, done = await live.events(COMPLETIONS, prompt="héy", max_tokens=6)
        assert done == "[DONE]"
        choices = [frame["choices"][0] for frame in frames]
        assert [it["text"] for it in choices] == ["", "h", "", "é", "y", ""]
        assert [it["finish_reason"] for it in choices] == [None] * 5 + ["length"]
        assert len({frame["id"] for frame in frames}) == 1
        assert not any("usage" in frame for frame in frames)

    served(test, step_s=0.05)


def test_frames_of_a_chat_with_usage_last():
    async def test(live: LiveHttp):
        options = {"include_usage": True}
        role, *frames, usage, done = await live.events(CHAT, messages=HI, max_tokens=4, stream_options=options)
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [it["choices"][0]["delta"] for it in frames] == [{"content": it} for it in ("", "[", "u", "s")]
        assert frames[-1]["choices"][0]["finish_reason"] == "length"
        assert all(frame["usage"] is None and frame["object"] == "chat.completion.chunk" for frame in (role, *frames))
        assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 4, "[DONE]")

    served(test, step_s=0.05)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (COMPLETIONS, {"prompt": "a", "foo": 1}, 400, "foo", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "temperature": -1}, 400, "temperature", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [258]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [5] * 2048}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [5], "max_tokens": 2048}, 400, "max_tokens", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "a", "model": "gpt"}, 404, "model", "model_not_found"),
        (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
        (CHAT, {"messages": HI, "top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "invalid_value"),
        (CHAT, {"messages": HI, "n": 2, "temperature": 0}, 400, "n", "invalid_value"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens", "invalid_value"),
        ("/tokenize", {}, 400, "prompt", "invalid_value"),
        ("/nope", {}, 404, None, "not_found"),
        ("/health", {}, 405, None, "method_not_allowed"),
    ],
)
def test_refusals_are_error_objects(path, body, status, param, code):
    async def test(live: LiveHttp):
        response = await live.post(path, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (status, param, code)
        assert (await live.post(COMPLETIONS, prompt="a", max_tokens=1)).status_code == 200

    served(test)


NUMBERS = st.sampled_from([0, 1, -1, 2, 64, 65, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 0.5, 1e-9, 1e300, -0.0, True])
TEXTS = st.sampled_from(["", "a", "\x00é"])
OTHERS = st.sampled_from([[], [1], ["a", ""], {}, {"5": 1}, {"999": 1}, [[1], []]])
VALUES = st.none() | NUMBERS | TEXTS | OTHERS
FIELDS = st.sampled_from(sorted(CompletionBody.model_fields.keys() - {"prompt", "model"}) + ["best_of", "x"])


@settings(max_examples=6)
@given(st.lists(st.dictionaries(FIELDS, VALUES, max_size=4), min_size=25, max_size=25))
def test_any_values_are_served_or_refused_by_name_and_nothing_stays(bodies):
    async def test(live: LiveHttp):
        for body in bodies:
            response = await live.post(COMPLETIONS, **{"prompt": "abc", **body})
            assert response.status_code in (200, 400, 429), (body, response.text)
            if response.status_code == 400:
                param = response.json()["error"]["param"]
                assert param.split(".")[0].split("[")[0] in {*body, "n", "max_tokens", "stream_options"}, (body, param)
        assert (await live.post(COMPLETIONS, prompt="a", max_tokens=1)).status_code == 200
        await eventually(lambda: not live.live.manager.running and not live.live.manager.waiting)

    served(test)


def test_a_full_queue_is_a_status_even_for_a_stream_and_of_a_batch_nothing_stays():
    async def test(live: LiveHttp):
        live.live.executor.running.clear()
        first = asyncio.create_task(live.post(COMPLETIONS, prompt="a", max_tokens=1))
        await eventually(lambda: len(live.live.manager.running) == 1)
        response = await live.post(COMPLETIONS, prompt=["a", "b", "c"], max_tokens=1, stream=True)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        await eventually(lambda: not live.live.manager.waiting)
        live.live.executor.running.set()
        assert (await first).status_code == 200

    served(test, manager=FakeManager(max_waiting=2))


def test_names_are_the_clients_and_of_two_at_once_the_second_is_refused():
    async def test(live: LiveHttp):
        live.live.executor.running.clear()
        header = {"x-request-id": "mine"}
        body = {"prompt": "a", "max_tokens": 1}
        first = asyncio.create_task(live.http.post(COMPLETIONS, json=body, headers=header))
        await eventually(lambda: len(live.live.manager.running) == 1)
        assert (await live.http.post(COMPLETIONS, json=body, headers=header)).status_code == 409
        live.live.server.generator.abort("cmpl-mine")
        live.live.executor.running.set()
        response = await first
        assert response.headers["x-request-id"] == "mine"
        assert response.json()["choices"][0]["finish_reason"] == "abort"

    served(test)


def test_a_lost_engine_ends_streams_with_an_error_and_health_says_so():
    async def test(live: LiveHttp):
        stream = asyncio.create_task(live.events(COMPLETIONS, prompt="ab", max_tokens=500))
        await eventually(lambda: live.live.manager.num_steps > 5)
        live.live.executor.raise_next = True
        *_, error, done = await stream
        assert (error["error"]["code"], done) == ("engine_failed", "[DONE]")
        await eventually(lambda: live.live.server.generator.refusing is not None)
        response = await live.http.get("/health")
        assert response.status_code == 503
        assert "fell off" in response.json()["error"]["message"]

    served(test, step_s=0.002)


def test_not_ready_is_503_with_a_hint():
    async def test(live: LiveHttp):
        for response in (await live.http.get("/health"), await live.post(COMPLETIONS, prompt="a")):
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")

    served(test, ready=False)


def test_models_version_and_tokens():
    async def test(live: LiveHttp):
        models = (await live.http.get("/v1/models")).json()
        assert [(it["id"], it["root"], it["max_model_len"]) for it in models["data"]] == [("org/echo", "/m", 2048)]
        assert (await live.http.get("/v1/models/org/echo")).json() == models["data"][0]
        assert (await live.http.get("/v1/models/other")).status_code == 404
        assert (await live.http.get("/version")).json() == {"version": loong_jax.__version__}
        tokens = (await live.post("/tokenize", prompt="hé", return_token_strs=True)).json()
        texts = ["<s>", "h", "\ufffd", "\ufffd"]
        expected = {"count": 4, "max_model_len": 2048, "tokens": [BOS, *"hé".encode()], "token_strs": texts}
        assert tokens == expected
        assert (await live.post("/tokenize", prompt="a", add_special_tokens=False)).json()["tokens"] == [97]
        assert (await live.post("/tokenize", messages=HI)).json()["tokens"] == HI_IDS
        assert (await live.post("/detokenize", tokens=tokens["tokens"])).json() == {"prompt": "hé"}

    served(test, config=HttpConfig(port=0, model_name="org/echo", model_root="/m"))


def test_without_a_tokenizer_token_ids_still_work():
    async def run():
        async with live_http(has_tokenizer=False) as live:
            response = await live.post(COMPLETIONS, prompt=[5, 6], max_tokens=3, logprobs=0, echo=True)
            choice = response.json()["choices"][0]
            assert choice["text"] == ""
            assert choice["logprobs"]["tokens"] == [f"token_id:{it}" for it in [5, 6, *echo([5, 6], 3)]]
            for path, body in (
                (COMPLETIONS, {"prompt": "a"}),
                (CHAT, {"messages": HI}),
                ("/detokenize", {"tokens": []}),
            ):
                assert (await live.post(path, **body)).status_code == 400

    asyncio.run(run())
