"""Gathers what a stream of an answer's messages told: the whole answer as one message, and the trailing metadata.

What it is not: the stream itself (`serving/stream.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from serving.proto.loong.v1 import loong_pb2 as pb

_MAX_RUNS = 64  # metadata are bounded
_PHASES = {pb.PHASE_PREFILL: "prefill", pb.PHASE_DECODE: "decode"}


class Gathered:
    """Of all choices of one request."""

    def __init__(self) -> None:
        self._finished: list[pb.Finished] = []
        self._tokens: dict[int, pb.Tokens] = defaultdict(pb.Tokens)
        self._scores: list[pb.PromptLogprobs] = []

    def ends(self, message: pb.GenerateResponse) -> None:
        """Of the messages written together the last one is enough, when only the trailing metadata are wanted."""
        if message.HasField("finished"):
            self._finished.append(message.finished)

    def keep(self, messages: Iterable[pb.GenerateResponse]) -> None:
        for message in messages:
            match message.WhichOneof("event"):
                case "tokens":
                    whole, part = self._tokens[message.tokens.choice], message.tokens
                    whole.token_ids.extend(part.token_ids)
                    whole.logprobs.extend(part.logprobs)
                    whole.top_logprobs.extend(part.top_logprobs)
                    whole.text += part.text
                    whole.choice = part.choice
                case "prompt_logprobs":
                    self._scores.append(message.prompt_logprobs)
                case _:
                    self.ends(message)

    def whole(self) -> pb.GenerateUnaryResponse:
        finished = sorted(self._finished, key=lambda it: it.choice)
        answers = [pb.Answer(tokens=self._tokens[it.choice], finished=it) for it in finished]
        for answer in answers:
            answer.tokens.choice = answer.finished.choice
        return pb.GenerateUnaryResponse(answers=answers, prompt_logprobs=self._scores)

    def trailing(self) -> tuple[tuple[str, str], ...]:
        """Metadata; none when nothing finished."""
        if not self._finished:
            return ()
        first = min(self._finished, key=lambda it: it.choice)
        return (
            ("prompt-tokens", str(first.usage.prompt_tokens)),
            ("completion-tokens", str(sum(it.usage.completion_tokens for it in self._finished))),
            ("queue-us", str(first.timing.queue_us)),
            ("ttft-us", str(first.timing.ttft_us)),
            ("total-us", str(first.timing.total_us)),
            ("dop-history", dop_history(first.dop_history)),
        )


def dop_history(runs: Iterable[pb.DopRun]) -> str:
    """As in "prefill:4x3 decode:2x6": phase, DoP, tokens. The last ones of many, behind three dots."""
    words = [f"{_PHASES.get(run.phase, '?')}:{run.dop}x{run.tokens}" for run in runs]
    return " ".join(words if len(words) <= _MAX_RUNS else ["...", *words[-_MAX_RUNS:]])
