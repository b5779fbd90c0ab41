"""Messages to answers: choices of several prompts, echo, usage."""

import json

from serving.generator import Admitted
from serving.http.answers import Answer, ChatForm, CompletionForm
from serving.http.schema import ChatBody, CompletionBody, StreamOptions
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.byte_tokenizer import byte_tokenizer

A, B = ord("a"), ord("b")


def tokens(text: str, choice: int = 0) -> pb.GenerateResponse:
    ids = list(text.encode())
    return pb.GenerateResponse(tokens=pb.Tokens(token_ids=ids, logprobs=[-1.0] * len(ids), text=text, choice=choice))


def finished(choice: int = 0, **fields) -> pb.GenerateResponse:
    fields.setdefault("finish_reason", pb.FINISH_REASON_LENGTH)
    return pb.GenerateResponse(finished=pb.Finished(choice=choice, **fields))


def completion(n: int = 1, num_prompts: int = 1, **fields) -> Answer:
    body = CompletionBody(prompt=["p"] * num_prompts, n=n, **fields)
    requests = [pb.GenerateRequest(text="p", n=n) for _ in range(num_prompts)]
    return Answer(CompletionForm(body, byte_tokenizer()), requests, id_="x", model="m", created_s=5)


def test_choices_of_prompts_are_numbered_through_and_usage_is_their_sum():
    answer = completion(n=2, num_prompts=2)
    for prompt in (1, 0):
        answer.admitted(prompt, Admitted("r", [7] * (3 + prompt)))
        for choice in (1, 0):
            answer.keep(prompt, [tokens("ab", choice)])
            answer.keep(prompt, [tokens(f"{prompt}{choice}", choice), finished(choice)])
    whole = json.loads(answer.whole())
    assert [(it["index"], it["text"]) for it in whole["choices"]] == [
        (0, "ab00"),
        (1, "ab01"),
        (2, "ab10"),
        (3, "ab11"),
    ]
    assert (whole["id"], whole["created"], whole["model"], whole["object"]) == ("cmpl-x", 5, "m", "text_completion")
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 16, 23)


def test_an_echo_alone_has_the_prompt_only():
    answer = completion(echo=True, max_tokens=0, logprobs=0)
    answer.admitted(0, Admitted("r", [A, B]))
    answer.keep(0, [pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(first=1, logprobs=[-2.0]))])
    answer.keep(0, [tokens("z"), finished()])
    whole = json.loads(answer.whole())
    assert whole["choices"][0]["text"] == "p"
    assert whole["choices"][0]["logprobs"]["token_logprobs"] == [None, -2.0]
    assert whole["usage"]["completion_tokens"] == 0


def test_the_echo_comes_with_the_first_tokens_of_each_choice():
    answer = completion(n=2, echo=True)
    answer.admitted(0, Admitted("r", [A]))
    texts = [
        answer.chunks(0, [message], None)[0]["choices"][0]["text"]
        for message in (tokens("x", 1), tokens("y", 0), tokens("z", 1))
    ]
    assert texts == ["px", "py", "z"]


def test_the_role_comes_first_and_the_reason_with_the_last_tokens():
    body = ChatBody(messages=[], n=2)
    answer = Answer(ChatForm(body, None), [pb.GenerateRequest(n=2)], id_="x", model="m", created_s=5)
    answer.admitted(0, Admitted("r", [A]))
    options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    chunks = answer.chunks(0, [tokens("x", 1)], options)
    chunks += answer.chunks(
        0, [tokens("y", 1), finished(1, finish_reason=pb.FINISH_REASON_STOP, matched_stop="z")], None
    )
    chunks += answer.chunks(0, [finished(0, finish_reason=pb.FINISH_REASON_ABORT)], None)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(it["index"], it["delta"], it["finish_reason"]) for it in choices] == [
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "x"}, None),
        (1, {"content": "y"}, "stop"),
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": ""}, "abort"),
    ]
    assert choices[2]["stop_reason"] == "z"
    assert chunks[1]["usage"]["completion_tokens"] == 1
    assert "usage" not in chunks[2]
    assert answer.last_chunk()["choices"] == []
