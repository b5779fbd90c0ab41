"""From the messages of a request to the bodies and frames that clients read: completions and chat.

What it is not: the exchange with the client (`serving/http/exchange.py`) or the shapes of log-probabilities
(`serving/http/logprobs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from serving.generator import Admitted
from serving.http import logprobs
from serving.http.logprobs import Scored, TokenNames
from serving.http.schema import ChatBody, CompletionBody, StreamOptions
from serving.http.translate import echoes_only
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.tokenizer import Tokenizer

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",  # vLLM's word: OpenAI has no abort
}


class Delta(NamedTuple):
    """What came of one choice: since the last one, or all of it."""

    text: str
    scored: list[Scored]
    finished: pb.Finished | None

    @property
    def finish_reason(self) -> str | None:
        return None if self.finished is None else _REASONS[self.finished.finish_reason]

    @property
    def stop_reason(self) -> str | None:
        """vLLM's field: the stop string found."""
        has_one = self.finished is not None and self.finished.HasField("matched_stop")
        return self.finished.matched_stop if has_one else None  # pyright: ignore[reportOptionalMemberAccess]

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Delta:
        """One after the other."""
        scored = [token for delta in deltas for token in delta.scored]
        return cls("".join(delta.text for delta in deltas), scored, deltas[-1].finished)


class Form(Protocol):
    """The shape of one kind of answer."""

    name: str  # `object` of the whole
    chunk_name: str  # `object` of a part
    prefix: str  # of the id
    wants_logprobs: bool

    def echo(self, prompt: int, token_ids: Sequence[int], scores: Sequence[pb.PromptLogprobs]) -> Delta | None:
        """What of the prompt comes before a choice's first token."""
        ...

    def num_generated(self, num_tokens: int) -> int:
        """How many of the engine's tokens are part of the answer."""
        ...

    def whole(self, index: int, delta: Delta) -> dict[str, Any]: ...
    def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]: ...


class CompletionForm:
    name = chunk_name = "text_completion"
    prefix = "cmpl-"

    def __init__(self, body: CompletionBody, tokenizer: Tokenizer | None) -> None:
        self.wants_logprobs = body.logprobs is not None
        self._body = body
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._offsets: dict[int, int] = {}
        self._echoes_only = echoes_only(body)

    def echo(self, prompt: int, token_ids: Sequence[int], scores: Sequence[pb.PromptLogprobs]) -> Delta | None:
        if not self._body.echo:
            return None
        given = self._body.prompt
        text = given if isinstance(given, str) else given[prompt] if given else ""
        if not isinstance(text, str):
            text = "" if self._tokenizer is None else self._tokenizer.decode(token_ids)
        scored = logprobs.of_prompt(token_ids, scores) if self.wants_logprobs else []
        return Delta(text, scored, None)

    def num_generated(self, num_tokens: int) -> int:
        return 0 if self._echoes_only else num_tokens

    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        table = None
        if self.wants_logprobs:
            offset = self._offsets.get(index, 0)
            table, self._offsets[index] = logprobs.tables(delta.scored, self._names, offset)
        return {
            "index": index,
            "text": delta.text,
            "logprobs": table,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [self.whole(index, delta)]


class ChatForm:
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, body: ChatBody, tokenizer: Tokenizer | None) -> None:
        self.wants_logprobs = bool(body.logprobs)
        self._names = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._begun: set[int] = set()

    def echo(self, prompt: int, token_ids: Sequence[int], scores: Sequence[pb.PromptLogprobs]) -> Delta | None:
        return None

    def num_generated(self, num_tokens: int) -> int:
        return num_tokens

    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, **self._ends(delta)}

    def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """A choice begins with its role."""
        parts = []
        if index not in self._begun:
            self._begun.add(index)
            begin = {"role": "assistant", "content": ""}
            parts.append({"index": index, "delta": begin, **self._ends(Delta("", [], None))})
        return [*parts, {"index": index, "delta": {"content": delta.text}, **self._ends(delta)}]

    def _ends(self, delta: Delta) -> dict[str, Any]:
        content = None
        if self.wants_logprobs and (delta.scored or delta.finished):
            content = {"content": logprobs.chat_content(delta.scored, self._names), "refusal": None}
        return {"logprobs": content, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}


class _Prompt:
    """What is known of one prompt of a body."""

    def __init__(self) -> None:
        self.token_ids: Sequence[int] = ()
        self.scores: list[pb.PromptLogprobs] = []
        self.num_tokens: dict[int, int] = {}  # choice -> generated


class Answer:
    """The answer to one body, as a whole or in frames. Choice c of prompt p has the index p * n + c."""

    def __init__(
        self, form: Form, requests: Sequence[pb.GenerateRequest], *, id_: str, model: str, created_s: int
    ) -> None:
        self._form = form
        self._n = max(1, requests[0].n)
        self._prompts = [_Prompt() for _ in requests]
        self._deltas: dict[int, list[Delta]] = {}
        self._echoed: set[int] = set()
        self._head = {"id": form.prefix + id_, "created": created_s, "model": model}

    def admitted(self, prompt: int, admitted: Admitted) -> None:
        self._prompts[prompt].token_ids = admitted.token_ids

    def take(self, prompt: int, messages: Sequence[pb.GenerateResponse]) -> tuple[int, Delta] | None:
        """The index of the choice these messages are of, and what they add; None when that is nothing yet."""
        known = self._prompts[prompt]
        delta, choice = None, 0
        for message in messages:
            match message.WhichOneof("event"):
                case "prompt_logprobs":
                    known.scores.append(message.prompt_logprobs)
                case "tokens":
                    tokens = message.tokens
                    choice = tokens.choice
                    known.num_tokens[choice] = known.num_tokens.get(choice, 0) + len(tokens.token_ids)
                    delta = self._generated(tokens)
                case _:
                    choice = message.finished.choice
                    delta = (delta or Delta("", [], None))._replace(finished=message.finished)
        return None if delta is None else (prompt * self._n + choice, delta)

    def _generated(self, tokens: pb.Tokens) -> Delta:
        if self._form.num_generated(1) == 0:
            return Delta("", [], None)
        return Delta(tokens.text, logprobs.of_tokens(tokens) if self._form.wants_logprobs else [], None)

    def keep(self, prompt: int, messages: Sequence[pb.GenerateResponse]) -> None:
        """For `whole`."""
        taken = self.take(prompt, messages)
        if taken is not None:
            index, delta = taken
            self._deltas.setdefault(index, []).append(delta)

    def whole(self) -> bytes:
        """When all has been kept."""
        choices = [
            self._form.whole(index, self._with_echo(index, Delta.of(deltas)))
            for index, deltas in sorted(self._deltas.items())
        ]
        body = {**self._head, "object": self._form.name, "choices": choices, "usage": self.usage()}
        return msgspec.json.encode(body)

    def chunks(
        self, prompt: int, messages: Sequence[pb.GenerateResponse], options: StreamOptions | None
    ) -> list[dict[str, Any]]:
        """The frames that these messages make."""
        taken = self.take(prompt, messages)
        if taken is None:
            return []
        index, delta = taken
        parts = self._form.parts(index, self._with_echo(index, delta))
        return [self._chunk([part], options) for part in parts]

    def last_chunk(self) -> dict[str, Any]:
        """The frame after all choices: the usage."""
        return {**self._head, "object": self._form.chunk_name, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        num_prompt = sum(len(prompt.token_ids) for prompt in self._prompts)
        num_generated = self._form.num_generated(sum(sum(prompt.num_tokens.values()) for prompt in self._prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": 0},  # no prefix is kept between requests
        }

    def _with_echo(self, index: int, delta: Delta) -> Delta:
        if index in self._echoed:
            return delta
        self._echoed.add(index)
        prompt = index // self._n
        known = self._prompts[prompt]
        echo = self._form.echo(prompt, known.token_ids, known.scores)
        return delta if echo is None else Delta.of((echo, delta))

    def _chunk(self, choices: list[dict[str, Any]], options: StreamOptions | None) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "object": self._form.chunk_name, "choices": choices}
        if options is not None and options.include_usage:
            # As OpenAI has it, null in all frames but the last; vLLM's option fills it in.
            chunk["usage"] = self.usage() if options.continuous_usage_stats else None
        return chunk
