"""What a benchmark asks: prompts of given lengths, from data sets drawn here or read from files.

Same seed, same prompts. What it is not: files of traces (`serving/bench/traces.py`), or when a prompt is sent
(`serving/bench/arrivals.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loong_jax.config import ConfigError
from serving.tokenizer import Tokenizer

MAX_PROMPT_TOKENS = 1 << 24
MAX_FILE_BYTES = 2 << 30
_TRIES = 20
"""Files hold conversations that are too short or too long: so many times more are looked at than are wanted."""


class Item(NamedTuple):
    """One request. `prompt`: token ids, or text. `num_prompt_tokens`: as counted here, without what the server adds.
    `arrival_s`: when a trace says it came. `answer`: what a right answer contains, None where nothing is judged."""

    prompt: str | tuple[int, ...]
    num_prompt_tokens: int
    max_tokens: int
    arrival_s: float | None = None
    answer: str | None = None


class Span(NamedTuple):
    """Lengths in tokens: `mean`, and a `ratio` of it to both sides, evenly."""

    mean: int
    ratio: float = 0.0

    def draw(self, rng: random.Random) -> int:
        return rng.randint(max(1, round(self.mean * (1 - self.ratio))), max(1, round(self.mean * (1 + self.ratio))))


def random_items(
    tokenizer: Tokenizer, num: int, seed: int, prompt: Span, output: Span, num_prefix: int = 0
) -> list[Item]:
    """Token ids drawn evenly from those that have a text; `num_prefix` of them are the same in all prompts."""
    words = [token for token in range(tokenizer.vocab_size) if tokenizer.has_text(token)]
    rng = random.Random(seed)
    prefix = rng.choices(words, k=num_prefix)
    out = []
    for _ in range(num):
        ids = (*prefix, *rng.choices(words, k=prompt.draw(rng)))
        out.append(Item(ids, len(ids), output.draw(rng)))
    return out


def sharegpt_items(path: Path, tokenizer: Tokenizer, num: int, seed: int, output_tokens: int | None) -> list[Item]:
    """First turns of conversations, as vLLM takes them: the answer's length is how many tokens are asked for. Those of
    fewer than 4 tokens or more than 1,024 (2,048 with the answer) are passed over. Raises ConfigError."""
    turns = [entry.get("conversations") or entry.get("conversation") for entry in _entries(path) if _is_dict(entry)]
    pairs = [
        (_text(turn[0]), _text(turn[1])) for turn in turns if isinstance(turn, list) and len(turn) >= 2 and turn[0]
    ]
    random.Random(seed).shuffle(pairs)
    out: list[Item] = []
    for prompt, answer in pairs[: _TRIES * num]:
        if len(out) == num:
            break
        if prompt is None or answer is None:
            continue
        num_prompt, num_answer = len(tokenizer.encode(prompt)), len(tokenizer.encode(answer))
        wanted = num_answer if output_tokens is None else output_tokens
        if num_prompt < 4 or num_prompt > 1024 or num_prompt + wanted > 2048 or wanted < 4:
            continue
        out.append(Item(prompt, num_prompt, wanted))
    return _enough(out, num, path)


def custom_items(path: Path, tokenizer: Tokenizer, num: int, output_tokens: int) -> list[Item]:
    """A JSON object a line: `prompt` (text or token ids), and if it likes `output_tokens` and `answer`. Raises
    ConfigError."""
    out = []
    for row, line in zip(range(num), path.read_text(encoding="utf-8").splitlines(), strict=False):
        where = f"dataset-path: {path}, line {row + 1}"
        try:
            entry = json.loads(line)
        except ValueError:
            raise ConfigError(f"{where}: is no JSON object") from None
        prompt = entry.get("prompt") if _is_dict(entry) else None
        tokens, answer = (entry.get("output_tokens", output_tokens), entry.get("answer")) if prompt else (0, None)
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not prompt or not (isinstance(prompt, str) or is_ids):
            raise ConfigError(f"{where}: prompt: must be text or token ids")
        if type(tokens) is not int or tokens < 1 or not isinstance(answer, str | None):
            raise ConfigError(f"{where}: output_tokens must be a positive integer, answer a text")
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        out.append(Item(prompt if isinstance(prompt, str) else tuple(prompt), len(ids), tokens, None, answer))
    return _enough(out, num, path)


def sonnet_items(
    path: Path | None, tokenizer: Tokenizer, num: int, seed: int, prompt_tokens: int, output_tokens: int, prefix: int
) -> list[Item]:
    """Lines of a text in random order after lines that all prompts begin with. Without a file, lines of prose."""
    rng = random.Random(seed)
    lines = prose(rng, 512) if path is None else [x for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    if not lines:
        raise ConfigError(f"dataset-path: {path} has no line of text")
    if prefix >= prompt_tokens:
        raise ConfigError(f"sonnet-prefix-len: {prefix} is not below sonnet-input-len, {prompt_tokens}")
    shared = _cut(tokenizer, lambda: lines, prefix)
    out = []
    for _ in range(num):
        text = shared + _cut(tokenizer, lambda: rng.sample(lines, len(lines)), prompt_tokens - prefix)
        out.append(Item(text, len(tokenizer.encode(text)), output_tokens))
    return out


def needle_items(
    tokenizer: Tokenizer, num: int, seed: int, prompt_tokens: Sequence[int], output_tokens: int
) -> list[Item]:
    """A pass key hidden in prose of one of the lengths, and the question for it: answers are judged."""
    rng = random.Random(seed)
    out = []
    for index in range(num):
        key = str(rng.randrange(10_000, 100_000))
        fact, question = f" The pass key is {key}.", "\nWhat is the pass key? The pass key is"
        room = prompt_tokens[index % len(prompt_tokens)] - len(tokenizer.encode(fact + question))
        if room < 1:
            raise ConfigError("needle-input-len: has no room for a fact and a question")
        lines = prose(rng, 64)
        filler = _cut(tokenizer, lambda lines=lines: rng.sample(lines, len(lines)), room).split(". ")
        depth = rng.randint(1, len(filler))
        before, after = ". ".join(filler[:depth]).rstrip(". "), ". ".join(filler[depth:])
        text = f"{before}.{fact} {after}".rstrip() + question
        out.append(Item(text, len(tokenizer.encode(text)), output_tokens, None, key))
    return out


_SUBJECTS = ("river", "garden", "road", "old house", "market", "north wind", "mountain", "harbour", "bridge", "forest")
_VERBS = ("lies behind", "leads to", "remembers", "is older than", "can be seen from", "is quieter than", "belongs to")


def prose(rng: random.Random, num: int) -> list[str]:
    """Short sentences that say nothing."""
    pick = rng.choice
    return [f"The {pick(_SUBJECTS)} {pick(_VERBS)} the {pick(_SUBJECTS)}." for _ in range(num)]


def _cut(tokenizer: Tokenizer, lines: Callable[[], Sequence[str]], num_tokens: int) -> str:
    """Whole lines, as many as `num_tokens` hold; at least one if any token is wanted."""
    text = ""
    room = num_tokens
    while room > 0:
        for line in lines():
            cost = len(tokenizer.encode_chat(" " + line))
            if text and cost > room:
                return text
            text, room = f"{text}{line} ", room - cost
    return text


def _entries(path: Path) -> list[Any]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"dataset-path: {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"dataset-path: {path} is no JSON: {str(error)[:200]}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"dataset-path: {path} is no list of conversations")
    return entries


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _text(turn: Any) -> str | None:
    value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    return value if isinstance(value, str) and value else None


def _enough(items: list[Item], num: int, path: Path) -> list[Item]:
    """A small file is asked again from its start, as vLLM does."""
    if not items:
        raise ConfigError(f"dataset-path: {path} has nothing that can be asked")
    return [items[i % len(items)] for i in range(num)]
