"""Lengths of prompts and outputs: the paper's data sets by their statistics, and files of real traces.

The data sets themselves are not here. ShareGPT, L-Eval and LV-Eval are drawn from piecewise linear distributions
through the quantiles that are known of them (LoongServe 7.2); a Zipf workload draws a length and takes the request of
the union of the three whose prompt is nearest, as the paper's recipe does. Prompt and output are independent.
What it is not: arrivals (`workloads.py`).
"""

from __future__ import annotations

import csv
import json
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from loong_jax.config import ConfigError


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


Draw = Callable[[random.Random, int], list[Lengths]]
"""So many requests, from that generator."""

Quantiles = tuple[tuple[float, float], ...]
"""(share, value), from share 0 to share 1; linear between."""

SHAREGPT_PROMPT: Quantiles = (
    (0.0, 4), (0.10, 143), (0.25, 398), (0.50, 822), (0.75, 1346), (0.90, 1826), (0.95, 2021),
    (0.99, 2202), (1.0, 2238),
)  # fmt: skip
SHAREGPT_OUTPUT: Quantiles = (
    (0.0, 4), (0.25, 22), (0.50, 137), (0.75, 384), (0.90, 602), (0.95, 765), (0.99, 974), (1.0, 993),
)  # fmt: skip
# The task mix: mean near 14K; narrative_qa is the last tenth, at about 49K.
LEVAL_PROMPT: Quantiles = (
    (0.0, 2_700), (0.20, 4_600), (0.50, 9_000), (0.75, 17_000), (0.85, 22_000), (0.91, 26_000), (0.92, 45_000),
    (0.995, 53_000), (1.0, 210_500),
)  # fmt: skip
# Exam answers of a few tokens, references of about 95 words: quantiles of the lengths that are public.
LEVAL_OUTPUT: Quantiles = (
    (0.0, 1), (0.35, 1), (0.5, 14), (0.6, 25), (0.75, 75), (0.9, 153), (0.95, 250), (0.99, 549), (1.0, 896),
)  # fmt: skip
LVEVAL_OUTPUT: Quantiles = ((0.0, 1), (0.5, 8), (0.9, 24), (1.0, 64))
LVEVAL_LEVELS = 5
LVEVAL_FIRST_LEVEL = 20_500  # 16K words at 1.28 tokens a word; each level doubles
LVEVAL_RANGE = (15_100, 497_300)

NUM_SHAREGPT, NUM_LEVAL, NUM_LVEVAL = 20_000, 2_043, 4_115
"""Sizes of the sets that a Zipf workload maps its lengths to."""

ZIPF_MIN, ZIPF_MAX = 10, 200_000
MIXED_MIN_PROMPT, MIXED_MIN_OUTPUT = 16, 4
MILLION = 1_000_000


def draw_quantiles(points: Quantiles, rng: random.Random) -> int:
    share = rng.random()
    index = bisect_left(points, (share, float("-inf")), 1, len(points) - 1)
    (low, start), (high, end) = points[index - 1], points[index]
    return round(start + (end - start) * (share - low) / (high - low))


def sharegpt(rng: random.Random, num: int) -> list[Lengths]:
    return [Lengths(draw_quantiles(SHAREGPT_PROMPT, rng), draw_quantiles(SHAREGPT_OUTPUT, rng)) for _ in range(num)]


def leval(rng: random.Random, num: int) -> list[Lengths]:
    return [Lengths(draw_quantiles(LEVAL_PROMPT, rng), draw_quantiles(LEVAL_OUTPUT, rng)) for _ in range(num)]


def lveval(rng: random.Random, num: int) -> list[Lengths]:
    """Evenly over the five levels of words, a quarter to both sides of each; the longest ones end the last level."""
    out = []
    for _ in range(num):
        level = LVEVAL_FIRST_LEVEL << rng.randrange(LVEVAL_LEVELS)
        reach = 1.5 if rng.random() < 0.02 else 1.25
        prompt = round(level * rng.uniform(0.75, reach))
        out.append(Lengths(min(max(prompt, LVEVAL_RANGE[0]), LVEVAL_RANGE[1]), draw_quantiles(LVEVAL_OUTPUT, rng)))
    return out


def mixed(rng: random.Random, num: int) -> list[Lengths]:
    """A third of each set, in random order, without the shortest."""
    out: list[Lengths] = []
    for index in range(num):
        draw = (sharegpt, leval, lveval)[index % 3]
        (lengths,) = draw(rng, 1)
        out.append(Lengths(max(lengths.prompt, MIXED_MIN_PROMPT), max(lengths.output, MIXED_MIN_OUTPUT)))
    rng.shuffle(out)
    return out


def zipf(exponent: float) -> Draw:
    """p(length) ~ 1 / length^exponent on [10, 200 000), mapped to the nearest prompt of the three sets."""
    if not 0 < exponent < 10:
        raise ConfigError(f"workload: a Zipf exponent of {exponent} is not between 0 and 10")

    def draw(rng: random.Random, num: int) -> list[Lengths]:
        pool = sharegpt(rng, NUM_SHAREGPT) + leval(rng, NUM_LEVAL) + lveval(rng, NUM_LVEVAL)
        by_prompt: dict[int, list[Lengths]] = {}
        for lengths in pool:
            by_prompt.setdefault(lengths.prompt, []).append(lengths)
        prompts = sorted(by_prompt)
        return [rng.choice(by_prompt[_nearest(prompts, x)]) for x in zipf_lengths(exponent, rng, num)]

    return draw


def zipf_lengths(exponent: float, rng: random.Random, num: int) -> list[int]:
    lengths = range(ZIPF_MIN, ZIPF_MAX)
    totals = list(accumulate(length**-exponent for length in lengths))
    return [ZIPF_MIN + bisect_left(totals, rng.random() * totals[-1]) for _ in range(num)]


def _nearest(ascending: Sequence[int], value: int) -> int:
    index = bisect_left(ascending, value)
    around = ascending[max(0, index - 1) : index + 1]
    return min(around, key=lambda other: abs(other - value))


def with_long(draw: Draw, share: float = 0.01, prompt: int = MILLION) -> Draw:
    """A `share` of the prompts, spread at random, becomes `prompt` tokens long."""

    def drawn(rng: random.Random, num: int) -> list[Lengths]:
        out = draw(rng, num)
        for index in rng.sample(range(num), round(num * share)):
            out[index] = Lengths(prompt, out[index].output)
        return out

    return drawn


# ---- files


class TraceFile(NamedTuple):
    """Requests of a file in their order, and when they came (seconds; () where it does not say)."""

    lengths: list[Lengths]
    arrivals_s: tuple[float, ...]


def read_trace(name: str, folder: Path) -> TraceFile:
    """Raises ConfigError for an unknown name and OSError for a file that is not there."""
    if name not in FILES:
        raise ConfigError(f"workload: no trace is called {name!r}; there are {', '.join(FILES)}")
    return _read(name, folder / FILES[name])


def read_trace_file(path: Path) -> TraceFile:
    """A file of one of the forms of FILES, or of a measured vLLM, whatever it is called; its first line tells which.
    Raises ConfigError for another form, OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.readline(4096)
    for name, words in _FIRST_LINES.items():
        if all(word in head for word in words):
            return _read(name, path)
    raise ConfigError(f"{path}: its first line is of no trace that is known: {head[:80]!r}")


def _read(name: str, path: Path) -> TraceFile:
    try:
        trace = _READERS[name](path)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"traces: {path} is not what {name!r} looks like: {error!r}") from error
    if not trace.lengths:
        raise ConfigError(f"traces: {path} has no request")
    return trace


def _azure(path: Path) -> TraceFile:
    lengths, seconds = [], []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            lengths.append(Lengths(int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))))
            hours, minutes, rest = row["TIMESTAMP"].split(" ")[1].split(":")
            seconds.append(int(hours) * 3600 + int(minutes) * 60 + float(rest))
    return TraceFile(lengths, tuple(s - seconds[0] for s in seconds))


def _mooncake(path: Path) -> TraceFile:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    lengths = [Lengths(row["input_length"], max(1, row["output_length"])) for row in rows]
    return TraceFile(lengths, tuple(row["timestamp"] / 1000 for row in rows))


def _arxiv(path: Path) -> TraceFile:
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["num_prefill_tokens"], row["num_decode_tokens"]) for row in csv.DictReader(file)]
    return TraceFile([Lengths(max(1, int(p)), max(1, int(d))) for p, d in rows], ())


def _leval(path: Path) -> TraceFile:
    """Characters; about four a token."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["prompt_chars"], row["output_chars"]) for row in csv.DictReader(file)]
    return TraceFile([Lengths(max(1, int(p) // 4), max(1, int(o) // 4)) for p, o in rows], ())


def _vllm(path: Path) -> TraceFile:
    with open(path, encoding="utf-8") as file:
        rows = sorted((json.loads(line) for line in file), key=lambda row: row["arrival_time"])
    lengths = [Lengths(row["input_toks"], max(1, row["output_toks"])) for row in rows]
    return TraceFile(lengths, tuple(row["arrival_time"] - rows[0]["arrival_time"] for row in rows))


FILES: Mapping[str, str] = MappingProxyType(
    {
        "azure": "azure2023_conv.csv",
        "mooncake": "mooncake_conversation.jsonl",
        "arxiv": "vidur_arxiv.csv",
        "leval-trace": "leval_lengths_chars.csv",
    }
)
"""Trace -> its file in a folder of traces."""

_READERS: Mapping[str, Callable[[Path], TraceFile]] = MappingProxyType(
    {"azure": _azure, "mooncake": _mooncake, "arxiv": _arxiv, "leval-trace": _leval, "vllm": _vllm}
)
_FIRST_LINES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        "mooncake": ('"timestamp"', '"input_length"', '"output_length"'),
        "arxiv": ("num_prefill_tokens", "num_decode_tokens"),
        "leval-trace": ("prompt_chars", "output_chars"),
        "vllm": ('"input_toks"', '"output_toks"', '"arrival_time"'),
    }
)
