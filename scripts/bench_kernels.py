#!/usr/bin/env python
"""Measures the blockwise kernels on CPU: flash against `jax.nn.dot_product_attention` and torch, paged decode by bytes.

Times are the best of a few calls; both sides of a ratio run in turns in one process, so that other work on the machine
slows both. Prints the tables of `docs/kernels_cpu.md`.

    JAX_PLATFORMS=cpu python scripts/bench_kernels.py [--tokens 1024,4096,16384] [--calls 3]
    JAX_PLATFORMS=cpu python scripts/bench_kernels.py --torch   # flash alone, beside torch SDPA
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_partial import flash_partial
from pallas_kernels.paged_partial import paged_partial
from pallas_kernels.storage import encode_bits

HEADS, KVH, DIM, PAGE_TOKENS = 8, 2, 64, 16
TORCH_ENVIRONMENT = Path("out/bench_kernels/venv-torch")
TORCH = ("torch>=2.6", "numpy")
DENSE_LIMIT_TOKENS = 4096
"""jax.nn keeps all scores: 16K tokens of 8 heads are 8 GiB in float32."""


def best_s(calls: int, functions: Sequence[Callable[[], object]]) -> list[float]:
    """The best time of each function, run in turns; the first call of each is not counted."""
    times = [[] for _ in functions]
    for call in range(calls + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if call > 0:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def bench_flash(tokens: Sequence[int], calls: int) -> None:
    print("| tokens | dtype | jax.nn ms | blockwise ms | times faster | causal GFLOP/s |\n|---|---|---|---|---|---|")
    for num_tokens in tokens:
        for dtype in (jnp.float32, jnp.bfloat16):
            keys = jax.random.split(jax.random.key(0), 3)
            q, k, v = (
                jax.random.normal(key, (num_tokens, h, DIM), dtype)
                for key, h in zip(keys, (HEADS, KVH, KVH), strict=True)
            )
            req, pos = jnp.zeros(num_tokens, jnp.int32), jnp.arange(num_tokens, dtype=jnp.int32)
            blockwise = jax.jit(
                lambda q, k, v, req, pos: flash_partial(q, k, v, req, pos, req, pos, scale=DIM**-0.5).out
            )
            dense = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True))
            functions = [lambda f=blockwise, a=(q, k, v, req, pos): f(*a)]
            if num_tokens <= DENSE_LIMIT_TOKENS:
                functions.append(lambda f=dense, a=(q, k, v): f(*a))
            block_s, *dense_s = best_s(calls, functions)
            dense_cells = (
                f"{dense_s[0] * 1e3:.1f} | {block_s * 1e3:.1f} | {dense_s[0] / block_s:.1f}"
                if dense_s
                else f"- | {block_s * 1e3:.1f} | -"
            )
            gflops = 2 * num_tokens**2 * HEADS * DIM / block_s / 1e9
            print(f"| {num_tokens} | {dtype.__name__} | {dense_cells} | {gflops:.0f} |", flush=True)


class TorchWorker:
    """torch SDPA in a process of its own, in an environment made if missing: torch is no dependency of the project."""

    def __init__(self, python: Path | None):
        python = python or TORCH_ENVIRONMENT / "bin" / "python"
        if not python.exists():
            print(f"installing torch into {TORCH_ENVIRONMENT}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", TORCH_ENVIRONMENT], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *TORCH], check=True)
        worker = Path(__file__).parent / "engine_workers" / "sdpa_worker.py"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([python, worker], stdin=pipe, stdout=pipe, text=True)
        self.version = self._answer()["torch"]

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def seconds(self, num_tokens: int, dtype: str) -> float:
        assert self._process.stdin is not None
        case = {"tokens": num_tokens, "heads": HEADS, "kv_heads": KVH, "dim": DIM, "dtype": dtype}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def causal_flash(num_tokens: int, dtype: jnp.dtype) -> Callable[[], object]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (num_tokens, h, DIM), dtype) for key, h in zip(keys, (HEADS, KVH, KVH), strict=True)
    )
    req, pos = jnp.zeros(num_tokens, jnp.int32), jnp.arange(num_tokens, dtype=jnp.int32)
    run = jax.jit(lambda *a: flash_partial(*a, scale=DIM**-0.5).out)
    return lambda: jax.block_until_ready(run(q, k, v, req, pos, req, pos))


def bench_torch(tokens: Sequence[int], calls: int, python: Path | None) -> None:
    """Both sides in turns, so that other work on the machine slows both; the best call of each counts."""
    worker = TorchWorker(python)
    print(f"torch {worker.version}\n")
    print("| tokens | dtype | torch SDPA ms | blockwise ms | times faster |\n|---|---|---|---|---|")
    for num_tokens in tokens:
        for dtype in ("float32", "bfloat16"):
            blockwise = causal_flash(num_tokens, jnp.dtype(dtype))
            blockwise()
            torch_s, block_s = [], []
            for _ in range(calls):
                torch_s.append(worker.seconds(num_tokens, dtype))
                start = time.perf_counter()
                blockwise()
                block_s.append(time.perf_counter() - start)
            cells = f"{min(torch_s) * 1e3:.1f} | {min(block_s) * 1e3:.1f} | {min(torch_s) / min(block_s):.2f}"
            print(f"| {num_tokens} | {dtype} | {cells} |", flush=True)
    worker.close()


def bench_paged(calls: int) -> None:
    num_pages = 4096
    print(
        "| storage | rows | q tokens | context a row | ms | KV GB/s | plain read GB/s |\n|---|---|---|---|---|---|---|"
    )
    for storage, dtype in ((jnp.float32, jnp.float32), (jnp.uint16, jnp.bfloat16)):
        shape = (1, num_pages, 2, KVH, PAGE_TOKENS, DIM)
        pool = encode_bits(jax.random.normal(jax.random.key(0), shape), jnp.dtype(storage))
        read = jax.jit(jnp.sum)
        plain = jnp.zeros(pool.nbytes // 4, jnp.float32)
        for rows, qtok, ctx in ((1, 1, 16384), (8, 1, 4096), (32, 1, 512), (128, 1, 64), (128, 1, 0), (8, 16, 4096)):
            pages = ctx // PAGE_TOKENS
            table = np.zeros((2 * num_pages, 3), np.int32)
            order = np.random.default_rng(0).permutation(num_pages)
            for e in range(rows * pages):
                table[e] = order[e % num_pages], e % pages * PAGE_TOKENS, PAGE_TOKENS
            q = jax.random.normal(jax.random.key(1), (rows, qtok, HEADS, DIM), dtype)
            arrays = (q, jnp.full((rows, qtok), ctx), pool, jnp.int32(0), jnp.asarray(table))
            arrays += (jnp.arange(rows) * pages, jnp.full(rows, pages))
            paged = jax.jit(lambda *a: paged_partial(*a, scale=DIM**-0.5))
            paged_s, read_s = best_s(calls, [lambda f=paged, a=arrays: f(*a), lambda f=read, a=plain: f(a)])
            kv_bytes = rows * ctx * 2 * KVH * DIM * pool.dtype.itemsize
            cells = f"{paged_s * 1e3:.2f} | {kv_bytes / paged_s / 1e9:.1f} | {pool.nbytes / read_s / 1e9:.1f}"
            print(f"| {pool.dtype} | {rows} | {qtok} | {ctx} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="1024,4096,16384", help="prompt lengths of the flash table")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each function")
    parser.add_argument("--torch", action="store_true", help="flash beside torch SDPA, nothing else")
    parser.add_argument("--torch-python", type=Path, help="an interpreter with torch; default: makes one")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}; ", end="")
    print(f"{HEADS} heads, {KVH} KV heads, head_dim {DIM}, pages of {PAGE_TOKENS}\n")
    if args.torch:
        bench_torch([int(n) for n in args.tokens.split(",")], args.calls, args.torch_python)
        return
    bench_flash([int(n) for n in args.tokens.split(",")], args.calls)
    print()
    bench_paged(args.calls)


if __name__ == "__main__":
    main()
