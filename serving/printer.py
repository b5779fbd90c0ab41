"""What `loong generate` writes: text, token ids, or tokens with their log-probabilities, and a summary at the end.

What it is not: the command (`serving/cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.proto.loong.v1 import loong_pb2 as pb


class Printer:
    """Pieces to print, for each message of an answer. Choices are printed one after the other, so all but the first
    unfinished one are held back. `tops`: a line for each token, with the likeliest beside it."""

    def __init__(self, num_choices: int, *, ids: bool, tops: bool) -> None:
        self._ids, self._tops = ids, tops
        self._held = [[f"choice {choice}:\n"] if num_choices > 1 else [] for choice in range(num_choices)]
        self._finished = [False] * num_choices
        self._current = 0

    def take(self, response: pb.GenerateResponse) -> list[str]:
        match response.WhichOneof("event"):
            case "tokens":
                self._held[response.tokens.choice] += self._pieces(response.tokens)
            case "prompt_logprobs":
                self._held[0] += prompt_lines(response.prompt_logprobs)
            case _:
                self._held[response.finished.choice].append("\n")
                self._finished[response.finished.choice] = True
        return self._flush()

    def _pieces(self, tokens: pb.Tokens) -> list[str]:
        if self._tops:
            tops = list(tokens.top_logprobs) or [pb.TopLogprobs()] * len(tokens.token_ids)
            return [
                token_line(token, logprob, top.token_ids, top.logprobs)
                for token, logprob, top in zip(tokens.token_ids, tokens.logprobs, tops, strict=True)
            ]
        return [f"{token} " for token in tokens.token_ids] if self._ids else [tokens.text]

    def _flush(self) -> list[str]:
        out: list[str] = []
        while self._current < len(self._held):
            out += self._held[self._current]
            self._held[self._current] = []
            if not self._finished[self._current]:
                break
            self._current += 1
        return out


def token_line(token: int | str, logprob: float, tops: Sequence[int], top_logprobs: Sequence[float]) -> str:
    """ "17 -0.25 | 17 -0.25, 4 -1.75" and a line's end."""
    likeliest = ", ".join(f"{top} {value:.4f}" for top, value in zip(tops, top_logprobs, strict=True))
    return f"{token} {logprob:.4f}" + (f" | {likeliest}" if likeliest else "") + "\n"


def prompt_lines(scores: pb.PromptLogprobs) -> list[str]:
    """A line for each token of the prompt, by its place: the ids are the client's own."""
    k, tops, values = scores.num_top, scores.top_token_ids, scores.top_logprobs
    return [
        token_line(f"prompt[{scores.first + i}]", logprob, tops[k * i : k * (i + 1)], values[k * i : k * (i + 1)])
        for i, logprob in enumerate(scores.logprobs)
    ]


def summary(finished: pb.Finished, first_s: float, total_s: float) -> str:
    """Of one choice, for standard error."""
    reason = pb.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
    runs = ", ".join(
        f"{pb.Phase.Name(run.phase).removeprefix('PHASE_').lower()} {run.tokens} at DoP {run.dop}"
        for run in finished.dop_history
    )
    usage = f"{finished.usage.prompt_tokens} + {finished.usage.completion_tokens} tokens"
    choice = f"choice {finished.choice}: " if finished.choice else ""
    return f"[{choice}{reason}; {usage}; first after {first_s:.2f} s, all after {total_s:.2f} s; {runs}]"
