"""Compiles decode attention ahead of time for TPUs that are not there and prints what memory it takes, as JSON.

    python -m tests.pallas_kernels.tpu_paged quick | others | CASE...     (names of `CASES`)

A scan over layers writes a token of each row and attends over pages, as an engine step does. Run as a program by
`test_tpu_compile.py`, for the reasons of `tpu_memory.py`. Output: one object per case: name, pool_bytes, alias_bytes,
temp_bytes, out_bytes (of one partial), per device, and whether the program has the kernel (not the fallback).
"""

import json
import os
import sys
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.paged_partial import paged_partial
from pallas_kernels.storage import write_slots

LAYERS, POOL_TOKENS = 4, 1 << 15


class Case(NamedTuple):
    topology: str = "v5e:2x4"
    page_tokens: int = 16
    rows: int = 32
    qtok: int = 1
    kvh: int = 8
    group: int = 4
    dim: int = 128
    dtype: str = "bfloat16"
    window: bool = False
    soft_cap: float | None = None
    num_entries: int = 8192


CASES = {
    "v5e": Case(),
    "page 1": Case(page_tokens=1, kvh=2),
    "page 128": Case(page_tokens=128),
    "gather-q": Case(rows=128, qtok=16, window=True),
    "dim 64": Case(dim=64, window=True, soft_cap=30.0),
    "dim 256, MHA": Case(dim=256, kvh=16, group=1, rows=127),
    # the slow leg; of other chips the suite has a decode step (`loong_jax/aot/test_compiled.py`)
    "v6e": Case(topology="v6e:2x4"),
    "v5p": Case(topology="v5p:2x2x2"),
    "tpu7x": Case(topology="tpu7x:2x2x1"),
    "page 2": Case(page_tokens=2),
    "page 4": Case(page_tokens=4),
    "page 8": Case(page_tokens=8),
    "page 24": Case(page_tokens=24),
    "page 32": Case(page_tokens=32),
    "page 64": Case(page_tokens=64),
    "page 1, float32": Case(page_tokens=1, dtype="float32"),
    "page 1, dim 256": Case(page_tokens=1, dim=256),
    "dim 80": Case(dim=80),
    "dim 96": Case(dim=96),
    "MHA": Case(kvh=32, group=1),
    "one KV head": Case(kvh=1, group=8),
    "float32": Case(dtype="float32"),
    "1M tokens": Case(num_entries=(1 << 20) + 3, page_tokens=1, kvh=1),
    "page of queries": Case(page_tokens=128, rows=16, qtok=128),
    "few queries": Case(rows=64, qtok=4),
    "v6e gather-q": Case(topology="v6e:2x4", rows=128, qtok=16),
    "v5p gather-q": Case(topology="v5p:2x2x2", rows=128, qtok=16),
    "tpu7x gather-q": Case(topology="tpu7x:2x2x1", rows=128, qtok=16),
    "v6e page 1": Case(topology="v6e:2x4", page_tokens=1),
    "v5p page 1": Case(topology="v5p:2x2x2", page_tokens=1),
    "tpu7x page 1": Case(topology="tpu7x:2x2x1", page_tokens=1),
}
SHARES = {"quick": list(CASES)[:6], "others": list(CASES)[6:]}


def shapes(case: Case) -> list[jax.ShapeDtypeStruct]:
    i32, pool_dim = jnp.int32, -(-case.dim // 128) * 128
    token = ((case.rows, case.kvh, case.dim), case.dtype)
    row = ((case.rows,), i32)
    pool = (LAYERS, POOL_TOKENS // case.page_tokens, 2, case.kvh, case.page_tokens, pool_dim)
    return [
        jax.ShapeDtypeStruct(*described)
        for described in (
            (pool, case.dtype),
            ((case.rows, case.qtok, case.kvh * case.group, case.dim), case.dtype),
            ((case.rows, case.qtok), i32),
            ((case.num_entries, 3), i32),
            *[row] * 4,
            *[token] * 2,
        )
    ]


def program(case: Case):
    def run(pool, q, q_pos, entries, row_start, row_len, pages, slots, k, v):
        def layer_step(carry, layer):
            pool, total = carry
            pool = write_slots(pool, layer, pages, slots, k, v)
            part = paged_partial(
                q, q_pos, pool, layer, entries, row_start, row_len,
                scale=0.1, window=layer + 100 if case.window else None, soft_cap=case.soft_cap, platform="tpu",
            )  # fmt: skip
            return (pool, total + part.out.sum() + part.lse.max()), None

        return lax.scan(layer_step, (pool, jnp.zeros(())), jnp.arange(LAYERS))[0]

    return run


def main(wanted: list[str]) -> None:
    for name in [name for word in wanted for name in SHARES.get(word, [word])]:
        case = CASES[name]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
        mesh = Mesh(np.array(topology.devices[:1]), ("sp",))
        placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P())) for s in shapes(case)]
        mapped = jax.shard_map(program(case), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        compiled = jax.jit(mapped, donate_argnums=0).lower(*placed).compile()
        memory = compiled.memory_analysis()
        report = {
            "name": name,
            "pool_bytes": placed[0].size * placed[0].dtype.itemsize,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "out_bytes": 4 * case.rows * case.qtok * case.kvh * case.group * placed[0].shape[-1],
            "kernel": "tpu_custom_call" in compiled.as_text(),
        }
        print(json.dumps(report), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
