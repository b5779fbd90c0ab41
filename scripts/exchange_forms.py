"""Whether XLA for TPU lets a kernel run while queries are exchanged, by the form of the exchange: a table.

    python scripts/exchange_forms.py [v5e:2x4]

A scan over layers as in decode: queries of all ranks for one kernel, own queries for another, which needs nothing of
the exchange. It needs no TPU. What it is not: the engine's decode step (`loong_jax/esp/decode.py`).
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax.aot.collectives import collectives_of
from loong_jax.aot.hlo import Module
from loong_jax.aot.targets import target

ROWS, DIM, TOKENS, BLOCK = 128, 128, 32768, 512
Options = dict[str, Any]
ASYNC_GATHERS: Options = {"xla_enable_async_all_gather": "true"}
FUSED: Options = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


def scores(q, kv):
    """A kernel that reads all of `kv` [TOKENS, DIM], as attention does."""

    def kernel(q, kv, out, block, arrived):
        def step(i, _):
            copy = pltpu.make_async_copy(kv.at[pl.ds(i * BLOCK, BLOCK)], block, arrived)
            copy.start()
            copy.wait()
            out[...] += jnp.dot(q[...], block[...].T, preferred_element_type=jnp.float32)[:, :DIM]
            return 0

        out[...] = jnp.zeros_like(out)
        lax.fori_loop(0, TOKENS // BLOCK, step, 0)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((q.shape[0], DIM), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((BLOCK, DIM), jnp.bfloat16), pltpu.SemaphoreType.DMA(())],
        cost_estimate=pl.CostEstimate(flops=2 * q.size * TOKENS, bytes_accessed=2 * kv.size, transcendentals=0),
        name="scores",
    )(q, kv)


def gather(q, dop: int):
    return lax.all_gather(q, "sp", tiled=True)


def all_to_all(q, dop: int):
    return lax.all_to_all(jnp.broadcast_to(q, (dop, *q.shape)), "sp", 0, 0).reshape(-1, DIM)


def permutes(q, dop: int):
    rings = [[(rank, (rank + hop) % dop) for rank in range(dop)] for hop in range(1, dop)]
    return jnp.concatenate([q, *(lax.ppermute(q, "sp", ring) for ring in rings)])


def forms(devices, exchange, options: Options | None) -> str:
    mesh, dop = Mesh(np.array(devices), ("sp",)), len(devices)

    def layer(carry, _):
        q, kv = carry
        q = jnp.tanh(q @ jnp.ones((DIM, DIM), q.dtype))
        own, others = scores(q, kv), scores(exchange(q, dop), kv)
        return ((own + others.reshape(dop, ROWS, DIM).sum(0)).astype(q.dtype), kv), None

    program = lambda q, kv: lax.scan(layer, (q, kv), None, length=4)[0][0]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False)
    place = lambda size: jax.ShapeDtypeStruct((dop * size, DIM), jnp.bfloat16, sharding=NamedSharding(mesh, P("sp")))
    compiled = jax.jit(mapped).lower(place(ROWS), place(TOKENS)).compile(compiler_options=options)
    found = collectives_of(Module(compiled.as_text()), 1)
    return ", ".join(f"{sum(one.form == form for one in found)} {form}" for form in sorted({one.form for one in found}))


def main(name: str) -> None:
    devices = target(name).devices
    print(f"| exchange over {name} | options | collectives of a layer |")
    print("|---|---|---|")
    for exchange, options in (
        (gather, None),
        (gather, ASYNC_GATHERS),
        (gather, FUSED),
        (all_to_all, None),
        (permutes, None),
    ):
        words = ", ".join(options or ()) or "none"
        print(f"| {exchange.__name__} | {words} | {forms(devices, exchange, options)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["v5e:2x4"])
