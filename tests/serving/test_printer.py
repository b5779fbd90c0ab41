"""What is printed of an answer, choice by choice."""

from serving.printer import Printer
from serving.proto.loong.v1 import loong_pb2 as pb


def tokens(text: str, choice: int = 0, **fields) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=pb.Tokens(text=text, token_ids=text.encode(), choice=choice, **fields))


def finished(choice: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(choice=choice))


def printed(printer: Printer, *responses: pb.GenerateResponse) -> list[str]:
    return ["".join(printer.take(response)) for response in responses]


def test_one_answer_goes_out_as_it_comes():
    assert printed(Printer(1, ids=False, tops=False), tokens("a"), tokens("b"), finished()) == ["a", "b", "\n"]
    assert printed(Printer(1, ids=True, tops=False), tokens("ab")) == ["97 98 "]


def test_choices_do_not_mix():
    out = printed(
        Printer(3, ids=False, tops=False),
        tokens("c", 2), tokens("a", 0), finished(2), tokens("b", 1), finished(0), tokens("d", 1), finished(1),
    )  # fmt: skip
    assert out == ["choice 0:\n", "a", "", "", "\nchoice 1:\nb", "d", "\nchoice 2:\nc\n"]


def test_tokens_with_the_likeliest():
    top = pb.TopLogprobs(token_ids=[97, 4], logprobs=[-0.5, -2.0])
    out = printed(Printer(1, ids=False, tops=True), tokens("a", logprobs=[-0.5], top_logprobs=[top]))
    assert out == ["97 -0.5000 | 97 -0.5000, 4 -2.0000\n"]
    assert printed(Printer(1, ids=False, tops=True), tokens("a", logprobs=[-0.5])) == ["97 -0.5000\n"]


def test_tokens_of_the_prompt():
    scores = pb.PromptLogprobs(
        first=7, logprobs=[-1.0, -2.0], num_top=1, top_token_ids=[3, 4], top_logprobs=[-0.25, -0.75]
    )
    (out,) = printed(Printer(1, ids=False, tops=False), pb.GenerateResponse(prompt_logprobs=scores))
    assert out == "prompt[7] -1.0000 | 3 -0.2500\nprompt[8] -2.0000 | 4 -0.7500\n"
