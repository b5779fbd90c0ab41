"""Compiles decode attention ahead of time for H200 and prints what it takes, one JSON object a case.

    python -m tests.pallas_kernels.gpu_paged ["page 16" ...]

A scan over layers writes a token of each row and attends over pages, as an engine step does. Run as a program by
`test_gpu_compile.py`. It needs no GPU (`gpu_topology.py` says what it needs). Output: name, what
`gpu_topology.resources` says, pool_bytes, alias_bytes, temp_bytes, out_bytes (of one partial), compile_cpu_s.
"""

import json
import os
import sys
import time
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_partial import gpu
from pallas_kernels.storage import write_slots
from tests.pallas_kernels.gpu_topology import compile_on, h200_mesh, resources

LAYERS, POOL_TOKENS = 4, 1 << 17


class Case(NamedTuple):
    page_tokens: int = 16
    rows: int = 32
    qtok: int = 1
    kvh: int = 8
    group: int = 4
    dim: int = 128
    window: bool = False
    soft_cap: float | None = None
    num_entries: int = 8192


CASES = {
    "page 16": Case(),
    "page 64": Case(page_tokens=64),
    "page 128": Case(page_tokens=128),
    "gather-q, window, soft cap": Case(rows=128, qtok=16, window=True, soft_cap=30.0),
    "dim 256, MHA": Case(dim=256, kvh=16, group=1, rows=127),
    # the slow leg
    "page 8": Case(page_tokens=8),
    "page 32": Case(page_tokens=32),
    "dim 64": Case(dim=64),
    "one KV head": Case(kvh=1, group=8),
    "1M tokens": Case(num_entries=(1 << 16) + 3, rows=1),
}


def shapes(case: Case) -> list[jax.ShapeDtypeStruct]:
    token, row = (case.rows, case.kvh, case.dim), (case.rows,)
    floats = [
        (LAYERS, POOL_TOKENS // case.page_tokens, 2, case.kvh, case.page_tokens, -(-case.dim // 64) * 64),
        (case.rows, case.qtok, case.kvh * case.group, case.dim),
        *[token] * 2,
    ]
    integers = [(case.rows, case.qtok), (case.num_entries, 3), *[row] * 4]
    return [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in floats] + [
        jax.ShapeDtypeStruct(s, jnp.int32) for s in integers
    ]


def program(case: Case):
    def run(pool, q, k, v, q_pos, entries, row_start, row_len, pages, slots):
        def layer_step(carry, layer):
            pool, total = carry
            pool = write_slots(pool, layer, pages, slots, k, v)
            part = gpu.paged_partial(
                q, q_pos, pool, layer, entries, row_start, row_len,
                scale=0.1, window=layer + 100 if case.window else None, soft_cap=case.soft_cap,
            )  # fmt: skip
            return (pool, total + part.out.sum() + part.lse.max()), None

        return lax.scan(layer_step, (pool, jnp.zeros(())), jnp.arange(LAYERS))[0]

    return run


def main(names: list[str]) -> None:
    mesh = h200_mesh()
    for name in names:
        case, start = CASES[name], time.process_time()
        placed = shapes(case)
        compile_it = lambda case=case, placed=placed: compile_on(mesh, program(case), *placed, donate=0)
        compiled, used = resources(compile_it)
        memory = compiled.memory_analysis()
        report = {
            "name": name,
            **used,
            "pool_bytes": 2 * placed[0].size,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "out_bytes": 4 * case.rows * case.qtok * case.kvh * case.group * case.dim,
            "compile_cpu_s": round(time.process_time() - start, 1),
        }
        print(json.dumps(report), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
