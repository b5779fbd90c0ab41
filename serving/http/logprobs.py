"""Log-probabilities in OpenAI's two shapes: the tables of completions and the list of chat.

What it is not: the choice of which are reported (`serving/http/translate.py` asks, the engine answers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from serving.proto.loong.v1 import loong_pb2 as pb
from serving.tokenizer import Tokenizer

_LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's clients know this number."""


class Scored(NamedTuple):
    """A token with its log-probability (None: a prompt's first) and the likeliest ones in its place."""

    token_id: int
    logprob: float | None
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


class TokenNames:
    """Tokens as text, or as "token_id:17" where that was asked for and where the model has no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer
        self._names: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        name = self._names.get(token_id)
        if name is None:
            name = f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.shown(token_id)
            self._names[token_id] = name
        return name


def of_tokens(tokens: pb.Tokens) -> list[Scored]:
    if not tokens.top_logprobs:
        return list(map(Scored, tokens.token_ids, tokens.logprobs))
    rows = zip(tokens.token_ids, tokens.logprobs, tokens.top_logprobs, strict=True)
    return [Scored(token, logprob, top.token_ids, top.logprobs) for token, logprob, top in rows]


def of_prompt(token_ids: Sequence[int], parts: Iterable[pb.PromptLogprobs]) -> list[Scored]:
    """All tokens of a prompt; those that no part speaks of (the first) have none."""
    scored = [Scored(token, None) for token in token_ids]
    for part in parts:
        k = part.num_top
        for row, logprob in enumerate(part.logprobs):
            index = part.first + row
            tops = slice(row * k, (row + 1) * k)
            scored[index] = Scored(token_ids[index], logprob, part.top_token_ids[tops], part.top_logprobs[tops])
    return scored


def tables(tokens: Iterable[Scored], names: TokenNames, offset: int) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion whose text has `offset` characters before these tokens, and how many after."""
    texts, logprobs, tops, offsets = [], [], [], []
    for scored in tokens:
        name = names[scored.token_id]
        texts.append(name)
        logprobs.append(_finite(scored.logprob))
        tops.append(_table(scored, names))
        offsets.append(offset)
        offset += len(name)
    table = {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
    return table, offset


def _table(scored: Scored, names: TokenNames) -> dict[str, float] | None:
    """The likeliest tokens and the token itself. Of several with one name the likeliest stands."""
    if scored.logprob is None:
        return None
    table: dict[str, float] = {}
    for token, logprob in zip(scored.top_ids, scored.top_logprobs, strict=True):
        # The token's own value, to the last bit: clients compare it with the largest.
        own = token == scored.token_id
        table.setdefault(names[token], _clamped(scored.logprob if own else logprob))
    table.setdefault(names[scored.token_id], _clamped(scored.logprob))
    return table


def chat_content(tokens: Iterable[Scored], names: TokenNames) -> list[dict[str, Any]]:
    """The `logprobs.content` of a chat answer."""
    return [
        {
            **_entry(names[scored.token_id], scored.logprob),
            "top_logprobs": [
                _entry(names[token], logprob)
                for token, logprob in zip(scored.top_ids, scored.top_logprobs, strict=True)
            ],
        }
        for scored in tokens
    ]


def _entry(name: str, logprob: float | None) -> dict[str, Any]:
    # Of a part of a character the text is U+FFFD, and its bytes are not known here.
    raw = None if "\ufffd" in name else list(name.encode())
    return {"token": name, "logprob": _finite(logprob), "bytes": raw}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else _clamped(logprob)


def _clamped(logprob: float) -> float:
    return max(logprob, _LEAST)
