#!/usr/bin/env python
"""Measures the block sizes of the attention kernels on this machine's device and writes the fastest as JSON.

For each shape of a model every size in turn is timed against what the heuristic chooses, all in one process and in
rounds; what is not faster by more than the noise stays with the heuristic and is not written. `loong serve
--kernel-sizes FILE` takes the file, as do the ops (`tuning=`). On CPU it tunes the blockwise path.

    python scripts/tune_kernels.py --out sizes.json [--heads 32] [--kv-heads 8] [--dim 128] [--calls 5]
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import flash_partial as flash
from pallas_kernels import paged_partial as paged
from pallas_kernels.chips import current_device_kind
from pallas_kernels.dispatch import default_platform
from pallas_kernels.storage import encode_bits
from pallas_kernels.tuning import Tuned, dump

Sizes = dict[str, int]
GAIN = 0.97
"""Of the heuristic's time: what is not below it is noise."""


def combinations(**choices: Sequence[int]) -> list[Sizes]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


CANDIDATES: dict[tuple[str, str], list[Sizes]] = {
    ("flash_partial", "blockwise"): combinations(q_rows=(256, 512, 1024), kv_block=(128, 256, 512)),
    ("flash_partial", "tpu"): combinations(block_q=(128, 256, 512), block_kv=(256, 512, 1024)),
    ("flash_partial", "gpu"): combinations(block_kv=(64, 128), stages=(2, 3), weights_in_registers=(0, 1)),
    ("paged_partial", "blockwise"): combinations(tile_tokens=(64, 128, 256), step_tiles=(2, 8, 32)),
    ("paged_partial", "tpu"): combinations(block_pages=(16, 32, 64, 128), fold_pages=(8, 16, 32)),
    ("paged_partial", "gpu"): combinations(stages=(2, 3, 4), shares=(16, 33, 66)),
}
"""Sizes to try; what a kernel refuses is left out."""


class Shape(NamedTuple):
    """One measurement: an op, the numbers it is known by, and its arrays."""

    op: str
    numbers: Sizes
    arrays: tuple[jax.Array, ...]


class Attention(NamedTuple):
    """Of one device: what tp leaves of the heads."""

    heads: int
    kv_heads: int
    dim: int
    dtype: jnp.dtype

    def normal(self, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(len(shape)), shape, self.dtype)


def flash_shapes(model: Attention, tokens: Iterable[int]) -> Iterable[Shape]:
    """A causal block against itself, as in the ring's first step."""
    for tok in tokens:
        q = model.normal(tok, model.heads, model.dim)
        k, v = (model.normal(tok, model.kv_heads, model.dim) for _ in range(2))
        request, position = jnp.zeros(tok, jnp.int32), jnp.arange(tok, dtype=jnp.int32)
        numbers = {"tok": tok, "ctx": tok, "group": model.heads // model.kv_heads, "dim": model.dim}
        yield Shape("flash_partial", numbers, (q, k, v, request, position, request, position))


def paged_shapes(model: Attention, rows: Iterable[int], ctx: int, page_tokens: int, storage: str) -> Iterable[Shape]:
    """Decode: rows of one token over `ctx` tokens each."""
    pages = ctx // page_tokens
    for num_rows in rows:
        pool = model.normal(1, num_rows * pages, 2, model.kv_heads, page_tokens, -(-model.dim // 128) * 128)
        entry = jnp.arange(num_rows * pages, dtype=jnp.int32)
        table = jnp.stack([entry, entry % pages * page_tokens, jnp.full_like(entry, page_tokens)], axis=1)
        numbers = {"rows": num_rows, "qtok": 1, "group": model.heads // model.kv_heads, "dim": model.dim}
        yield Shape(
            "paged_partial",
            numbers | {"page_tokens": page_tokens},
            (
                model.normal(num_rows, 1, model.heads, model.dim),
                jnp.full((num_rows, 1), ctx, jnp.int32),
                encode_bits(pool, jnp.dtype(storage)),
                jnp.int32(0),
                table,
                jnp.arange(num_rows, dtype=jnp.int32) * pages,
                jnp.full(num_rows, pages, jnp.int32),
            ),
        )


def seconds(calls: int, functions: Sequence[Callable[[], object]]) -> list[float]:
    """The best time of each, run in rounds, so that other work on the machine slows all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(calls):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def compiled(function: Callable, shape: Shape, sizes: Sizes) -> Callable[[], object] | None:
    """Ready to run; None where the kernel refuses these sizes."""
    run = jax.jit(lambda *arrays: function(*arrays, scale=shape.numbers["dim"] ** -0.5, **sizes))
    try:
        jax.block_until_ready(run(*shape.arrays))
    except (NotImplementedError, ValueError):
        return None
    return lambda: run(*shape.arrays)


def tune(shape: Shape, implementation: str, calls: int) -> tuple[Sizes, float, float]:
    """The fastest sizes (none: the heuristic's), their seconds, and the heuristic's."""
    op = flash if shape.op == "flash_partial" else paged
    function = op.IMPLEMENTATIONS[implementation]
    tried = [(sizes, compiled(function, shape, sizes)) for sizes in ({}, *CANDIDATES[shape.op, implementation])]
    ready = [(sizes, run) for sizes, run in tried if run is not None]
    times = seconds(calls, [run for _, run in ready])
    heuristic_s = times[0]
    best_s, sizes = min(((time_s, sizes) for time_s, (sizes, _) in zip(times, ready, strict=True)), key=lambda t: t[0])
    return (sizes, best_s, heuristic_s) if best_s < GAIN * heuristic_s else ({}, heuristic_s, heuristic_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--heads", type=int, default=32, help="query heads of one device")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads of one device")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tokens", default="512,2048,8192", help="prefill tokens of one device")
    parser.add_argument("--rows", default="1,8,32,128", help="decode rows")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each decode row")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each size")
    args = parser.parse_args()
    platform, chip = default_platform(), current_device_kind()
    implementation = {"cpu": "blockwise"}.get(platform, platform)
    model = Attention(args.heads, args.kv_heads, args.dim, jnp.dtype(jnp.bfloat16))
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    shapes = itertools.chain(
        flash_shapes(model, numbers(args.tokens)),
        paged_shapes(
            model, numbers(args.rows), args.context, args.page_tokens, "uint16" if platform == "cpu" else "bfloat16"
        ),
    )
    print(f"jax {jax.__version__}, {chip}, {implementation}\n")
    print("| op | shape | sizes | ms | heuristic ms |\n|---|---|---|---|---|")
    records = []
    for shape in shapes:
        sizes, best_s, heuristic_s = tune(shape, implementation, args.calls)
        words = lambda pairs: " ".join(f"{name}={number}" for name, number in pairs.items()) or "heuristic"
        cells = (shape.op, words(shape.numbers), words(sizes), f"{best_s * 1e3:.2f}", f"{heuristic_s * 1e3:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        if sizes:
            pairs = (tuple(sorted(shape.numbers.items())), tuple(sorted(sizes.items())))
            records.append(Tuned(chip, shape.op, implementation, *pairs))
    args.out.write_text(dump(tuple(records)))


if __name__ == "__main__":
    main()
