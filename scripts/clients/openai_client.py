"""What users of OpenAI's Python package do, one case after the other: sync and async, whole and streamed, chat and
completions, errors, tokens and log-probabilities. Run by scripts/try_clients.py; needs only `openai`.
"""

import asyncio
import json
import sys
import traceback

import openai

DOCUMENT = "The sky is blue. The pass key is 48213. The sun is yellow.\nWhat is the pass key? The pass key is"
GREEDY = {"temperature": 0.0, "seed": 1}


class Cases:
    """Each method is a case; it raises where the server is not as the package expects."""

    def __init__(self, url: str) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        self.async_client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        self.model = self.client.models.list().data[0].id

    def complete(self, **options):
        options = {"model": self.model, "prompt": DOCUMENT, "max_tokens": 6, **GREEDY, **options}
        return self.client.completions.create(**options)

    def chat(self, client, **options):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DOCUMENT}]
        options = {"model": self.model, "messages": messages, "max_completion_tokens": 6, **GREEDY, **options}
        return client.chat.completions.create(**options)

    def case_models(self):
        assert self.client.models.retrieve(self.model).id == self.model

    def case_completion_finds_the_key(self):
        answer = self.complete()
        assert "48213" in answer.choices[0].text, answer
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.completion_tokens_details is None
        assert answer._request_id

    def case_completion_stream_adds_up(self):
        chunks = list(self.complete(stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        whole = self.complete()
        assert text == whole.choices[0].text, (text, whole)
        assert chunks[-1].usage == whole.usage
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]

    def case_batches_and_choices(self):
        answer = self.complete(prompt=[DOCUMENT, "The sea is"], n=2, temperature=0.8, max_tokens=4)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        again = self.complete(prompt=[DOCUMENT, "The sea is"], n=2, temperature=0.8, max_tokens=4)
        assert [it.text for it in again.choices] == [it.text for it in answer.choices], "the same seed, the same text"

    def case_echo_with_logprobs(self):
        choice = self.complete(echo=True, logprobs=1, max_tokens=1).choices[0]
        table = choice.logprobs
        assert choice.text.startswith(DOCUMENT)
        assert table.token_logprobs[0] is None
        assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset)
        assert table.token_logprobs[-1] == max(table.top_logprobs[-1].values()), "greedy"

    def case_vllm_extras(self):
        extras = {"top_k": 5, "min_p": 0.01, "min_tokens": 2, "ignore_eos": True, "repetition_penalty": 1.1}
        answer = self.complete(temperature=0.5, max_tokens=5, stop=["\n\n\n"], extra_body=extras)
        assert answer.usage.completion_tokens == 5, answer

    def case_chat(self):
        answer = self.chat(self.client, logprobs=True, top_logprobs=2)
        choice = answer.choices[0]
        assert choice.message.role == "assistant"
        assert "48213" in choice.message.content, answer
        assert len(choice.logprobs.content) == answer.usage.completion_tokens
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)

    def case_chat_stream(self):
        chunks = list(self.chat(self.client, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == self.chat(self.client).choices[0].message.content
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens > 0

    def case_chat_stream_helper(self):
        messages = [{"role": "user", "content": DOCUMENT}]
        with self.client.chat.completions.stream(
            model=self.model, messages=messages, max_completion_tokens=6, **GREEDY
        ) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert "48213" in text, text

    def case_async_whole_and_streamed_at_once(self):
        async def ask():
            wholes = [self.chat(self.async_client) for _ in range(4)]
            stream = await self.chat(self.async_client, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return text, await asyncio.gather(*wholes)

        text, wholes = asyncio.run(ask())
        assert {whole.choices[0].message.content for whole in wholes} == {text}

    def case_leaving_a_stream(self):
        stream = self.complete(stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        assert self.complete(max_tokens=1).choices

    def case_structured_answers_parse(self):
        schema = {
            "type": "object",
            "properties": {
                "key": {"type": "integer", "minimum": 0, "maximum": 99999},
                "kind": {"enum": ["pass", "other"]},
            },
            "required": ["key", "kind"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema, "strict": True}}
        for temperature in (0.0, 1.0):
            answer = self.chat(self.client, response_format=form, max_completion_tokens=600, temperature=temperature)
            found = json.loads(answer.choices[0].message.content)
            assert set(found) == {"key", "kind"}, found
            assert answer.choices[0].finish_reason == "stop"
        extras = {"structured_outputs": {"regex": " [0-9]{5}"}}
        assert self.complete(max_tokens=20, extra_body=extras).choices[0].text == " 48213"
        extras = {"structured_outputs": {"choice": ["yes", "no"]}}
        assert self.complete(max_tokens=20, extra_body=extras).choices[0].text in ("yes", "no")

    def case_errors_have_their_classes(self):
        for kind, options in (
            (openai.BadRequestError, {"temperature": -1}),
            (openai.BadRequestError, {"extra_body": {"no_such_field": 1}}),
            (openai.NotFoundError, {"model": "no-such-model"}),
        ):
            error = self._error(options)
            assert isinstance(error, kind), error
            assert error.param in ("temperature", "no_such_field", "model"), error
            assert error.code, error

    def _error(self, options):
        try:
            self.complete(**options)
        except openai.APIStatusError as error:
            return error
        raise AssertionError(f"{options} was taken")


def main(url: str) -> int:
    cases = Cases(url)
    failed = 0
    for name in [name for name in dir(cases) if name.startswith("case_")]:
        try:
            getattr(cases, name)()
            print(f"ok      {name.removeprefix('case_')}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name.removeprefix('case_')}\n{traceback.format_exc()}", flush=True)
    print(f"openai {openai.__version__}: {failed} failed")
    return failed and 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
