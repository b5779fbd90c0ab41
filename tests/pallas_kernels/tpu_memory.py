"""Compiles the pool's readers and writers ahead of time for TPU v5e:2x4 and prints what memory they take, as JSON.

    python -m tests.pallas_kernels.tpu_memory 64 128     (head_dim)

Run as a program by `test_tpu_compile.py`: libtpu reads its settings once per process and ends the process on some
errors. It needs no TPU. Output: one object per program: name, pool_bytes, alias_bytes, temp_bytes (per device).
"""

import json
import os
import sys

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

from pallas_kernels.flash_partial import flash_partial
from pallas_kernels.paged_partial import paged_partial
from pallas_kernels.storage import gather_pages, read_all_layers, write_all_layers, write_pages, write_slots

LAYERS, PAGES, KVH, PAGE_TOKENS, POOL_DIM, HEADS = 8, 2048, 8, 16, 128, 32
ROWS, ENTRIES, CHUNK = 32, 8192, 1024


def programs(dim: int):
    """name -> (function(pool, *arrays) -> (pool, result), shapes of the arrays)."""
    i32, bf16 = jnp.int32, jnp.bfloat16
    kv = jax.ShapeDtypeStruct((CHUNK, KVH, dim), bf16)
    token = jax.ShapeDtypeStruct((ROWS, KVH, dim), bf16)
    page, row = jax.ShapeDtypeStruct((CHUNK // PAGE_TOKENS,), i32), jax.ShapeDtypeStruct((ROWS,), i32)
    table = jax.ShapeDtypeStruct((ENTRIES, 3), i32)
    q = jax.ShapeDtypeStruct((ROWS, 1, HEADS, dim), bf16)
    chunk_q, chunk = jax.ShapeDtypeStruct((CHUNK, HEADS, dim), bf16), jax.ShapeDtypeStruct((CHUNK,), i32)
    trips = jax.ShapeDtypeStruct((), i32)

    def over_layers(step):
        """Scans `step(pool, layer, total) -> (pool, total)` over the layers."""

        def layers(carry, layer):
            return step(carry[0], layer, carry[1]), None

        def run(pool):
            return lax.scan(layers, (pool, jnp.zeros((), jnp.float32)), jnp.arange(LAYERS))[0]

        return run

    def pages_program(pool, pages, k, v):
        return over_layers(lambda pool, layer, total: (write_pages(pool, layer, pages, k, v), total))(pool)

    def slots_program(pool, pages, slots, k, v):
        return over_layers(lambda pool, layer, total: (write_slots(pool, layer, pages, slots, k, v), total))(pool)

    def decode_program(pool, q, q_pos, entries, row_start, row_len, pages, slots, k, v):
        def step(pool, layer, total):
            part = paged_partial(q, q_pos[:, None], pool, layer, entries, row_start, row_len, scale=0.1, platform="tpu")
            return write_slots(pool, layer, pages, slots, k, v), total + part.out.sum()

        return over_layers(step)(pool)

    def ring_program(pool, trips, q, req, pos, pages, k, v):
        def step(pool, layer, total):
            def rotate(i, carry):
                pool, total = carry
                kc, vc = gather_pages(pool, layer, pages + i, dim)
                part = flash_partial(q, kc, vc, req, pos, req, pos, scale=0.1, platform="tpu")
                return write_pages(pool, layer, pages + i + 1, kc + k, vc + v), total + part.out.sum().astype(
                    total.dtype
                )

            return lax.fori_loop(0, trips, rotate, (pool, total))

        return over_layers(step)(pool)

    def move_program(pool, source, target):
        return write_all_layers(pool, target, read_all_layers(pool, source)), jnp.zeros(())

    return {
        "write_pages": (pages_program, (page, kv, kv)),
        "write_slots": (slots_program, (row, row, token, token)),
        "decode": (decode_program, (q, row, table, row, row, row, row, token, token)),
        "ring": (ring_program, (trips, chunk_q, chunk, chunk, page, kv, kv)),
        "move": (move_program, (page, page)),
    }


def main(dims: list[str]) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(topology.devices).reshape(8), ("sp",))
    pool = jax.ShapeDtypeStruct(
        (8 * LAYERS, PAGES, 2, KVH, PAGE_TOKENS, POOL_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, P("sp"))
    )
    for dim in map(int, dims):
        for name, (function, shapes) in programs(dim).items():
            specs = (P("sp"), *[P()] * len(shapes))
            mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P("sp"), P()), check_vma=False)
            arrays = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P())) for s in shapes]
            memory = jax.jit(mapped, donate_argnums=0).lower(pool, *arrays).compile().memory_analysis()
            report = {
                "name": f"{name} dim {dim}",
                "pool_bytes": LAYERS * PAGES * 2 * KVH * PAGE_TOKENS * POOL_DIM * 2,
                "alias_bytes": memory.alias_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
            }
            print(json.dumps(report), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
