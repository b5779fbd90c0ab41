"""Paged attention of decode, GQA heads of an 8B model, by bytes of KV, as a share of a copy measured beside it.

A scan over layers, each with pages of its own in any order, so that no cache holds them and starting a program does not
count. On a CPU the blockwise path stands in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import best_s
from jax import lax
from on_gpu.figures import Figures, Share

from pallas_kernels import paged_partial as paged

HEADS, KVH, DIM = 32, 8, 128
POOL_BYTES, COPY_BYTES, CALLS = 16 << 30, 4 << 30, 5
LEAST = 0.85


class Case(NamedTuple):
    rows: int
    ctx: int
    page_tokens: int = 16

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.ctx}, pages of {self.page_tokens}"

    @property
    def kv_bytes(self) -> int:
        """Of one layer, bfloat16."""
        return 2 * 2 * self.rows * self.ctx * KVH * DIM


CASES = (Case(32, 1 << 15), Case(32, 1 << 15, 64), Case(8, 1 << 15), Case(1, 1 << 17), Case(1, 1 << 17, 64))
TINY = (Case(2, 64),)


def names(tiny: bool) -> list[str]:
    return [case.name for case in (TINY if tiny else CASES)]


def measure(name: str, tiny: bool) -> Figures:
    case = next(case for case in (TINY if tiny else CASES) if case.name == name)
    layers = 2 if tiny else min(32, max(1, POOL_BYTES // case.kv_bytes))
    arrays = inputs(case, layers)
    array = jnp.ones((1 << 20 if tiny else COPY_BYTES) // 4, jnp.float32)
    decode, copy = jax.jit(decoder(case, layers)), jax.jit(lambda array: array + 1)
    decode_s, copy_s = best_s(CALLS, [lambda: decode(*arrays), lambda: copy(array)])
    read, copied = layers * case.kv_bytes / decode_s, 2 * array.nbytes / copy_s
    numbers = {"layer_us": decode_s / layers * 1e6, "kv_gbytes_per_s": read / 1e9, "copy_gbytes_per_s": copied / 1e9}
    return Figures(numbers, (Share("of the copy's bandwidth", read / copied, LEAST),))


def inputs(case: Case, layers: int) -> tuple[jax.Array, ...]:
    pages = case.ctx // case.page_tokens
    num_pages = case.rows * pages
    page = np.random.default_rng(0).permutation(num_pages)
    entry = np.arange(num_pages)
    table = np.stack([page, entry % pages * case.page_tokens, np.full(num_pages, case.page_tokens)], axis=1)
    normal = lambda *shape: jax.jit(lambda: jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16))()
    layer = normal(1, num_pages, 2, KVH, case.page_tokens, DIM)
    return (
        normal(case.rows, 1, HEADS, DIM),
        jax.jit(lambda layer: jnp.tile(layer, (layers, *[1] * 5)))(layer),
        *(jnp.asarray(a, jnp.int32) for a in (table, np.arange(case.rows) * pages, np.full(case.rows, pages))),
    )


def decoder(case: Case, layers: int):
    function = paged.IMPLEMENTATIONS["blockwise" if jax.default_backend() == "cpu" else "gpu"]

    def run(q, pool, table, start, length):
        position = jnp.full((case.rows, 1), case.ctx, jnp.int32)

        def layer_step(q, layer):
            part = function(q, position, pool, layer, table, start, length, scale=DIM**-0.5)
            return part.out.astype(q.dtype), None

        return lax.scan(layer_step, q, jnp.arange(layers))[0]

    return run
