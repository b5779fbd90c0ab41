"""Messages of a stream as one answer, and as trailing metadata."""

from serving.gather import Gathered, dop_history
from serving.proto.loong.v1 import loong_pb2 as pb


def tokens(choice: int, *ids: int, text: str = "") -> pb.GenerateResponse:
    part = pb.Tokens(choice=choice, token_ids=ids, logprobs=[-float(i) for i in ids], text=text)
    return pb.GenerateResponse(tokens=part)


def finished(choice: int, completion_tokens: int, *runs: pb.DopRun) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_tokens=3, completion_tokens=completion_tokens)
    timing = pb.Timing(queue_us=10 + choice, ttft_us=20 + choice, total_us=30 + choice)
    return pb.GenerateResponse(finished=pb.Finished(choice=choice, usage=usage, timing=timing, dop_history=runs))


RUN = pb.DopRun(phase=pb.PHASE_PREFILL, dop=4, tokens=3)
SCORES = pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(first=1, logprobs=[-1.0]))


def test_an_answer_of_several_choices():
    gathered = Gathered()
    for messages in ([SCORES, tokens(1, 5, text="a")], [tokens(0, 7), finished(0, 1, RUN)], [tokens(1, 6, text="b")]):
        gathered.keep(messages)
    gathered.keep([finished(1, 2)])
    whole = gathered.whole()
    assert [answer.finished.choice for answer in whole.answers] == [0, 1]
    assert [list(answer.tokens.token_ids) for answer in whole.answers] == [[7], [5, 6]]
    assert (whole.answers[1].tokens.text, list(whole.answers[1].tokens.logprobs)) == ("ab", [-5.0, -6.0])
    assert [scores.first for scores in whole.prompt_logprobs] == [1]
    assert dict(gathered.trailing()) == {
        "prompt-tokens": "3",
        "completion-tokens": "3",
        "queue-us": "10",
        "ttft-us": "20",
        "total-us": "30",
        "dop-history": "prefill:4x3",
    }


def test_a_choice_without_tokens_is_an_answer_too():
    gathered = Gathered()
    gathered.keep([finished(0, 0)])
    (answer,) = gathered.whole().answers
    assert not answer.tokens.token_ids


def test_metadata_are_bounded_and_absent_where_nothing_finished():
    assert Gathered().trailing() == ()
    runs = [pb.DopRun(phase=pb.PHASE_DECODE, dop=dop, tokens=2**40) for dop in range(10_000)]
    words = dop_history(runs).split()
    assert (len(words), words[0], words[-1]) == (65, "...", f"decode:9999x{2**40}")
    gathered = Gathered()
    gathered.keep([finished(0, 2**62, *runs)])
    assert sum(len(key) + len(value) for key, value in gathered.trailing()) < 4096
