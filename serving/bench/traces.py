"""Requests of a trace file: its lengths, its times, and random tokens of that many.

Takes the files of Azure's LLM inference traces, Mooncake, vidur, L-Eval's lengths and measured vLLM runs; which one it
is, the file's first line says. Prompts of Mooncake's that share a block's hash share its tokens.
What it is not: the simulator's use of the same files (`loong_jax/sim/lengths.py`, which reads them).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from loong_jax.config import ConfigError
from loong_jax.sim.lengths import read_trace_file
from serving.bench.prompts import Item
from serving.tokenizer import Tokenizer

BLOCK_TOKENS = 512
"""Of a hash in Mooncake's files."""


def trace_items(
    path: Path, tokenizer: Tokenizer, num: int, seed: int, *, length_scale: float = 1.0, max_total_tokens: int = 0
) -> list[Item]:
    """The first `num` requests whose scaled lengths fit into `max_total_tokens` (0: any). Raises ConfigError,
    OSError."""
    trace = read_trace_file(path)
    blocks = _hashes(path)
    words = [token for token in range(tokenizer.vocab_size) if tokenizer.has_text(token)]
    rng = random.Random(seed)
    out: list[Item] = []
    for index, lengths in enumerate(trace.lengths):
        if len(out) == num:
            break
        prompt, output = (max(1, round(length_scale * tokens)) for tokens in lengths)
        if max_total_tokens and prompt + output > max_total_tokens:
            continue
        size = max(1, round(BLOCK_TOKENS * length_scale))
        ids: list[int] = []
        for block in blocks[index] if blocks else ():
            ids += random.Random(f"{seed}/{block}").choices(words, k=size)
        ids = ids[:prompt]
        ids += rng.choices(words, k=prompt - len(ids))
        arrival_s = trace.arrivals_s[index] if trace.arrivals_s else None
        out.append(Item(tuple(ids), prompt, output, arrival_s))
    if not out:
        raise ConfigError(f"dataset-path: no request of {path} fits into {max_total_tokens} tokens")
    if len(out) < num:
        raise ConfigError(f"num-prompts: {path} has only {len(out)} that fit; ask for no more")
    first_s = out[0].arrival_s or 0.0
    return [item._replace(arrival_s=None if item.arrival_s is None else item.arrival_s - first_s) for item in out]


def _hashes(path: Path) -> list[list[int]]:
    """Block hashes of each request, [] where the file has none."""
    if path.suffix != ".jsonl":
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line).get("hash_ids", []) for line in file]
