"""Compiles `flash_partial`'s TPU kernel ahead of time and prints what it takes, one JSON object a case.

    python -m tests.pallas_kernels.tpu_flash "v5e long" "v6e"

Run as a program by `test_tpu_compile.py`: libtpu reads its settings once per process and ends the process on some
errors. It needs no TPU. Output: name, input_bytes, temp_bytes, flops (the kernel's own estimate),
all_pairs_flops.
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
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.flash_partial import tpu


class Case(NamedTuple):
    topology: str = "v5e:2x4"
    tok: int = 2048
    ctx: int = 2048
    heads: int = 8
    kvh: int = 2
    dim: int = 128
    dtype: str = "bfloat16"
    window: bool = False
    soft_cap: float | None = None


CASES = {
    "v5e": Case(window=True, soft_cap=30.0),
    "v5e dim 64, odd sizes": Case(tok=301, ctx=1000, heads=4, kvh=4, dim=64),
    "v5e dim 256": Case(heads=4, kvh=1, dim=256),
    "v5e long": Case(tok=32768, ctx=2**20, heads=8, kvh=1),
    "v6e": Case("v6e:2x4"),
    "v5p": Case("v5p:2x2x2"),
    "tpu7x": Case("tpu7x:2x2x1"),
    # the slow leg
    "v5e dim 80": Case(dim=80, window=True),
    "v5e dim 96": Case(dim=96, tok=1000, ctx=8200),
    "v5e float32": Case(dtype="float32", dim=256, heads=4, kvh=4, window=True, soft_cap=30.0),
    "v5e few tokens": Case(tok=7, ctx=129, heads=64, kvh=1),
    "v6e dim 256": Case("v6e:2x4", dim=256, dtype="float32"),
    "v5p dim 256": Case("v5p:2x2x2", dim=256, dtype="float32"),
    "tpu7x dim 256": Case("tpu7x:2x2x1", dim=256, dtype="float32"),
    "tpu7x long": Case("tpu7x:2x2x1", tok=32768, ctx=2**20, heads=8, kvh=1),
}


def compile_case(case: Case) -> jax.stages.Compiled:
    """The kernel alone, on arrays that come head first: then no transposition is needed at its borders."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices[0]
    mesh = Mesh(np.array([device]), ("sp",))

    def program(q, k, v, q_req, q_pos, kv_req, kv_pos, window):
        q, k, v = (a.swapaxes(0, 1) for a in (q, k, v))
        window = window if case.window else None
        part = tpu.flash_partial(
            q, k, v, q_req, q_pos, kv_req, kv_pos, scale=0.1, window=window, soft_cap=case.soft_cap
        )  # fmt: skip
        return part.out.swapaxes(0, 1), part.lse.T

    floats = [(case.heads, case.tok, case.dim), *[(case.kvh, case.ctx, case.dim)] * 2]
    integers = [*[(case.tok,)] * 2, *[(case.ctx,)] * 2, ()]
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    arrays = [place(s, case.dtype) for s in floats] + [place(s, jnp.int32) for s in integers]
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P())).lower(*arrays).compile()


def main(names: list[str]) -> None:
    for name in names:
        case = CASES[name]
        compiled = compile_case(case)
        itemsize = jnp.dtype(case.dtype).itemsize
        report = {
            "name": name,
            "input_bytes": (case.tok * case.heads + 2 * case.ctx * case.kvh) * case.dim * itemsize,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "flops": compiled.cost_analysis()["flops"],
            "all_pairs_flops": 4 * case.tok * case.heads * case.ctx * case.dim,
        }
        print(json.dumps(report), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
