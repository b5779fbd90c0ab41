"""One request's way out: from the engine's tokens to the messages of its gRPC stream.

A `RequestStream` is the sink of one request. It gathers what the engine sends while the client is being written to,
turns tokens into text, ends the request at a stop string, and keeps the DoP history. It lives in the asyncio thread.
What it is not: the RPC itself (`serving/server.py`).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import Protocol

import msgspec

from loong_jax.types import Emit, EmitScores, Finish, FinishReason, Reject
from serving.errors import EngineFailed, rejected
from serving.loop import Crashed, Prefilled, SinkItem
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.tokenizer import Detokenizer, StopFinder

_REASONS: dict[FinishReason, pb.FinishReason] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


class StreamStart(msgspec.Struct, frozen=True):
    """What a stream knows before the first token. Stop strings are looked for after `min_tokens` tokens."""

    request_id: str
    prompt_field: str
    num_prompt_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    choice: int = 0
    min_tokens: int = 0
    arrived_us: int = 0


class StreamObserver(Protocol):
    """Is told what happens to one choice, at times of the engine's clock; `ended` once, however the end comes."""

    def prefilled(self, now_us: int) -> None: ...
    def emitted(self, num_tokens: int, now_us: int) -> None: ...
    def ended(self, reason: FinishReason, num_tokens: int) -> None: ...


class DopHistory:
    """Runs of (phase, dop, tokens). The first token after a prefill is that prefill's: no decode run counts it."""

    def __init__(self, arrived_us: int) -> None:
        self.runs: list[pb.DopRun] = []
        self._arrived_us = arrived_us
        self._first_step_us: int | None = None
        self._first_token_us: int | None = None
        self._prefill_emits = False

    def timing(self, now_us: int) -> pb.Timing:
        """Of a request that ends now; what never came is as late as the end."""
        first_step_us = now_us if self._first_step_us is None else self._first_step_us
        first_token_us = now_us if self._first_token_us is None else self._first_token_us
        return pb.Timing(
            queue_us=first_step_us - self._arrived_us,
            ttft_us=first_token_us - self._arrived_us,
            total_us=now_us - self._arrived_us,
        )

    def prefilled(self, item: Prefilled, now_us: int) -> None:
        self._extend(pb.PHASE_PREFILL, item.dop, item.num_tokens, now_us)
        self._prefill_emits = item.emit

    def emitted(self, dop: int, num_tokens: int, now_us: int) -> None:
        if self._first_token_us is None:
            self._first_token_us = now_us
        if self._prefill_emits:
            self._prefill_emits = False
            num_tokens -= 1
        if num_tokens > 0:
            self._extend(pb.PHASE_DECODE, dop, num_tokens, now_us)

    def _extend(self, phase: pb.Phase, dop: int, num_tokens: int, now_us: int) -> None:
        if self._first_step_us is None:
            self._first_step_us = now_us
        if self.runs and self.runs[-1].phase == phase and self.runs[-1].dop == dop:
            self.runs[-1].tokens += num_tokens
        else:
            self.runs.append(pb.DopRun(phase=phase, dop=dop, tokens=num_tokens, start_us=now_us - self._arrived_us))


class RequestStream:
    """Sink of one choice of a request; `messages()` gives its next messages."""

    def __init__(
        self,
        start: StreamStart,
        detokenizer: Detokenizer | None,
        stop: Sequence[str],
        observer: StreamObserver | None = None,
    ) -> None:
        self._start = start
        self._observer = observer
        self._reason = FinishReason.ABORT  # unless it finishes
        self._detokenizer = detokenizer
        self._stop_ids = frozenset(start.stop_ids)
        self._stop_finder = StopFinder(stop)
        self._history = DopHistory(start.arrived_us)
        self._newest_us = start.arrived_us
        self._items: list[tuple[SinkItem, int]] = []
        self._arrived = asyncio.Event()
        self._num_tokens = 0
        self._matched: str | None = None
        self.engine_done = False
        """The engine has said its last word about this request."""
        self.finished = False
        """The last message has been given."""

    @property
    def seed(self) -> int:
        return self._start.seed

    @property
    def num_tokens(self) -> int:
        """Generated tokens kept so far."""
        return self._num_tokens

    @property
    def stop_found(self) -> bool:
        """A stop string ended the stream: the engine, when not yet done, must be told to keep `num_tokens`."""
        return self._matched is not None

    def put(self, item: SinkItem, now_us: int) -> None:
        self._items.append((item, now_us))
        if type(item) is Reject:
            self._observer = None  # it was refused, not served
        if type(item) is not Emit and isinstance(item, Finish | Reject | Crashed):
            self.engine_done = True
        self._arrived.set()

    def close(self) -> None:
        """No message is asked for any more."""
        if self._observer is not None:
            self._observer.ended(self._reason, self._num_tokens)

    async def messages(self) -> list[pb.GenerateResponse]:
        """Wait for output; everything there is by then, as one or two messages. Raises Refusal."""
        await self._arrived.wait()
        self._arrived.clear()
        items, self._items = self._items, []
        tokens = pb.Tokens(choice=self._start.choice)
        scores: list[pb.GenerateResponse] = []
        last: Finish | None = None
        for item, now_us in items:
            self._newest_us = now_us
            if isinstance(item, Emit):
                self._take(item, tokens, now_us)
                if self.stop_found:
                    break
            elif isinstance(item, Prefilled):
                self._history.prefilled(item, now_us)
                if self._observer is not None:
                    self._observer.prefilled(now_us)
            elif isinstance(item, EmitScores):
                scores.append(pb.GenerateResponse(prompt_logprobs=_prompt_logprobs(item)))
            elif isinstance(item, Reject):
                raise rejected(item.reason, item.message, self._start.prompt_field)
            elif isinstance(item, Crashed):
                self._reason = FinishReason.ERROR
                raise EngineFailed(item.message)
            else:
                last = item
        return scores + self._close(tokens, last)

    def _take(self, emit: Emit, tokens: pb.Tokens, now_us: int) -> None:
        assert emit.index == self._num_tokens, f"tokens from {emit.index} after {self._num_tokens}"
        first, pieces = self._num_tokens, []
        for token, logprob in zip(emit.tokens, emit.logprobs, strict=True):
            tokens.token_ids.append(token)
            tokens.logprobs.append(logprob)
            if emit.tops:
                top = emit.tops[self._num_tokens - first]
                tokens.top_logprobs.add(token_ids=top.tokens, logprobs=top.logprobs)
            self._num_tokens += 1
            if self._detokenizer is None or token in self._stop_ids:
                continue
            text = self._detokenizer.step(token)
            if self._num_tokens <= self._start.min_tokens:
                pieces.append(text)
                continue
            piece = self._stop_finder.step(text)
            pieces.append(piece.text)
            if piece.matched is not None:
                self._matched = piece.matched
                break
        tokens.text += "".join(pieces)
        self._history.emitted(emit.dop, self._num_tokens - first, now_us)
        if self._observer is not None:
            self._observer.emitted(self._num_tokens - first, now_us)

    def _close(self, tokens: pb.Tokens, last: Finish | None) -> list[pb.GenerateResponse]:
        """The messages for these tokens; with the last word, also what the text still held back."""
        if last is not None and last.reason is FinishReason.ERROR:
            self._reason = FinishReason.ERROR
            raise EngineFailed(last.message or "the engine failed")
        if last is not None and not self.stop_found and self._detokenizer is not None:
            piece = self._stop_finder.step(self._detokenizer.flush())
            tokens.text += piece.text + ("" if piece.matched is not None else self._stop_finder.flush())
            self._matched = piece.matched
        messages = []
        if tokens.token_ids or tokens.text:
            messages.append(pb.GenerateResponse(tokens=tokens))
        if self.stop_found or last is not None:
            self.finished = True
            self._reason = FinishReason.STOP if self.stop_found or last is None else last.reason
            messages.append(pb.GenerateResponse(finished=self._finished(_REASONS[self._reason])))
        return messages

    def _finished(self, reason: pb.FinishReason) -> pb.Finished:
        return pb.Finished(
            finish_reason=reason,
            usage=pb.Usage(prompt_tokens=self._start.num_prompt_tokens, completion_tokens=self._num_tokens),
            dop_history=self._history.runs,
            request_id=self._start.request_id,
            seed=self._start.seed,
            matched_stop=self._matched,
            choice=self._start.choice,
            timing=self._history.timing(self._newest_us),
        )


def _prompt_logprobs(item: EmitScores) -> pb.PromptLogprobs:
    scores = item.scores
    return pb.PromptLogprobs(
        first=item.first,
        logprobs=array("f", scores.logprobs),
        num_top=scores.k,
        top_token_ids=array("i", scores.top_tokens),
        top_logprobs=array("f", scores.top_logprobs),
    )
