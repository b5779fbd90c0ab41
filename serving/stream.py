"""One request's way out: from the engine's tokens to the messages of its gRPC stream.

A `RequestStream` is the sink of one request. It gathers what the engine sends while the client is being written to: a
reader, or a server, that falls behind gets more tokens a message. It turns tokens into text, ends the request at a stop
string, and keeps the DoP history. It lives in the asyncio thread. What it is not: the RPC itself (`serving/server.py`),
or the bound of what may wait (`serving/backpressure.py`).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from loong_jax.types import Emit, EmitScores, Finish, FinishReason, Reject, Top
from serving.errors import EngineFailed, rejected
from serving.outbox import Crashed, Prefilled, SinkItem
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
        self._open: tuple[pb.Phase, int] | None = None  # phase and dop of the last run, whose tokens are counted here
        self._decode_dop = 0  # the last run's, when it is one of decode steps
        self._num_tokens = 0

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
        if dop == self._decode_dop:
            self._num_tokens += num_tokens
        elif num_tokens > 0:
            self._extend(pb.PHASE_DECODE, dop, num_tokens, now_us)

    def take_back(self, num_tokens: int) -> None:
        """The last tokens are not part of the answer: a stop string came before them."""
        self.close()
        while num_tokens > 0 and self.runs:
            run = self.runs[-1]
            if run.phase == pb.PHASE_DECODE and run.tokens > num_tokens:
                run.tokens -= num_tokens
                return
            # A prefill that was done again has emitted one token, which no decode run counts.
            num_tokens -= run.tokens if run.phase == pb.PHASE_DECODE else 1
            del self.runs[-1]

    def close(self) -> None:
        """Write down the last run."""
        if self._open is not None:
            self.runs[-1].tokens = self._num_tokens
            self._open, self._decode_dop = None, 0

    def _extend(self, phase: pb.Phase, dop: int, num_tokens: int, now_us: int) -> None:
        if self._first_step_us is None:
            self._first_step_us = now_us
        if self._open == (phase, dop):
            self._num_tokens += num_tokens
        else:
            self.close()
            self.runs.append(pb.DopRun(phase=phase, dop=dop, start_us=now_us - self._arrived_us))
            self._open, self._num_tokens = (phase, dop), num_tokens
            self._decode_dop = dop if phase == pb.PHASE_DECODE else 0


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
        self._stop_finder = StopFinder(stop) if stop else None
        self._history = DopHistory(start.arrived_us)
        self._newest_us = start.arrived_us
        # What came since the last message was made: 8 bytes a token, however far behind its reader is.
        self._tokens = array("i")
        self._logprobs = array("f")
        self._tops: list[Top] = []
        self._scores: list[EmitScores] = []
        self._last: Finish | Reject | Crashed | None = None
        self._arrived = False  # there is something to make a message of
        self._waiter: asyncio.Future[None] | None = None
        self._num_received = 0  # by `put`
        self._num_tokens = 0  # of these, in messages
        self._matched: str | None = None
        self._ended = False  # nothing more of the engine's is wanted
        self.on_unread: Callable[[], None] | None = None
        """Called when more tokens wait to become a message, and more than `few_unread` do."""
        self.few_unread = 0
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
    def num_unread(self) -> int:
        """Tokens that wait to become a message; each likeliest token beside them counts as one more."""
        tops = self._tops
        return len(self._tokens) + (len(tops) * len(tops[0].tokens) if tops else 0)

    @property
    def stop_found(self) -> bool:
        """A stop string ended the stream: the engine, when not yet done, must be told to keep `num_tokens`."""
        return self._matched is not None

    def put(self, item: SinkItem, now_us: int) -> None:
        if type(item) is Emit:
            if self._ended:  # the engine does not know yet
                return
            self._newest_us = now_us
            self._emitted(item, now_us)
        elif isinstance(item, Prefilled):
            self._history.prefilled(item, now_us)
            if self._observer is not None:
                self._observer.prefilled(now_us)
            return
        elif isinstance(item, EmitScores):
            self._scores.append(item)
        else:
            assert isinstance(item, Finish | Reject | Crashed)
            self._last = item
            self.engine_done = True
            if not self._ended:
                self._newest_us = now_us
            if isinstance(item, Reject):
                self._observer = None  # it was refused, not served
        self._arrived = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _emitted(self, item: Emit, now_us: int) -> None:
        assert item.index == self._num_received, f"tokens from {item.index} after {self._num_received}"
        num_tokens = len(item.tokens)
        self._num_received += num_tokens
        self._tokens.extend(item.tokens)
        self._logprobs.extend(item.logprobs)
        if item.tops:
            self._tops += item.tops
        self._history.emitted(item.dop, num_tokens, now_us)
        if self._observer is not None:
            self._observer.emitted(num_tokens, now_us)
        # A token in a stream whose client keeps up costs a comparison here.
        if self.on_unread is not None and (len(self._tokens) > self.few_unread or self._tops):
            self.on_unread()

    def close(self) -> None:
        """No message is asked for any more."""
        self._ended = True
        self._tokens, self._tops = array("i"), []
        if self._observer is not None:
            self._observer.ended(self._reason, self._num_tokens)
            self._observer = None

    async def messages(self) -> list[pb.GenerateResponse]:
        """Wait for output; everything there is by then, as few messages. Raises Refusal."""
        if not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._arrived = False
        last = self._last
        if isinstance(last, Reject):
            raise rejected(last.reason, last.message, self._start.prompt_field)
        if isinstance(last, Crashed) or (last is not None and last.reason is FinishReason.ERROR):
            self._reason = FinishReason.ERROR
            raise EngineFailed(last.message or "the engine failed")
        messages: list[pb.GenerateResponse] = []
        if self._scores:
            messages += [pb.GenerateResponse(prompt_logprobs=_prompt_logprobs(item)) for item in self._scores]
            self._scores = []
        tokens, self._tokens = self._tokens, array("i")
        logprobs, self._logprobs = self._logprobs, array("f")
        num_kept, text = self._text(tokens)
        self._num_tokens += num_kept
        if last is not None and not self.stop_found:
            text += self._last_text()
        if num_kept or text:
            if num_kept < len(tokens):
                tokens, logprobs = tokens[:num_kept], logprobs[:num_kept]
            messages.append(self._tokens_message(tokens, logprobs, text))
        if self.stop_found or last is not None:
            self.finished = True
            self._reason = FinishReason.STOP if self.stop_found or last is None else last.reason
            messages.append(pb.GenerateResponse(finished=self._finished(_REASONS[self._reason])))
        return messages

    def _text(self, tokens: array[int]) -> tuple[int, str]:
        """How many of these tokens are part of the answer, and the text that they complete."""
        if self._detokenizer is None:
            return len(tokens), ""
        finder = self._stop_finder
        if finder is None:
            shown = [token for token in tokens if token not in self._stop_ids] if self._stop_ids else tokens
            return len(tokens), self._detokenizer.steps(shown)
        pieces = []
        for index, token in enumerate(tokens):
            if token in self._stop_ids:
                continue
            text = self._detokenizer.step(token)
            if self._num_tokens + index < self._start.min_tokens:
                pieces.append(text)
                continue
            piece = finder.step(text)
            pieces.append(piece.text)
            if piece.matched is not None:
                self._matched, self._ended = piece.matched, True
                self._history.take_back(len(tokens) - index - 1)
                return index + 1, "".join(pieces)
        return len(tokens), "".join(pieces)

    def _last_text(self) -> str:
        """What was held back: a character that is not complete, what might have become a stop string."""
        if self._detokenizer is None:
            return ""
        rest = self._detokenizer.flush()
        if self._stop_finder is None:
            return rest
        piece = self._stop_finder.step(rest)
        self._matched = piece.matched
        return piece.text + ("" if piece.matched is not None else self._stop_finder.flush())

    def _tokens_message(self, token_ids: array[int], logprobs: array[float], text: str) -> pb.GenerateResponse:
        message = pb.GenerateResponse()
        tokens = message.tokens  # filled in place: no message is made to be copied
        tokens.token_ids.extend(token_ids)
        tokens.logprobs.extend(logprobs)
        if self._tops:
            for top in self._tops[: len(token_ids)]:
                tokens.top_logprobs.add(token_ids=top.tokens, logprobs=top.logprobs)
            self._tops = []
        tokens.text = text
        if self._start.choice:
            tokens.choice = self._start.choice
        return message

    def _finished(self, reason: pb.FinishReason) -> pb.Finished:
        self._history.close()
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
