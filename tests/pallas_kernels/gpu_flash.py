"""Compiles `flash_partial`'s GPU kernel ahead of time for H200 and prints what it takes, one JSON object a case.

    python -m tests.pallas_kernels.gpu_flash ["dim 256" ...]

Run as a program by `test_gpu_compile.py`. It needs no GPU (`gpu_topology.py` says what it needs). Output: name,
estimated_smem_bytes, what `gpu_topology.resources` says, temp_bytes, input_bytes, compile_cpu_s.
"""

import json
import os
import sys
import time
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from pallas_kernels.flash_partial import gpu
from tests.pallas_kernels.gpu_topology import compile_on, h200_mesh, resources


class Case(NamedTuple):
    tok: int = 2048
    ctx: int = 2048
    heads: int = 8
    kvh: int = 2
    dim: int = 128
    window: bool = False
    soft_cap: float | None = None
    weights_in_registers: bool = False


CASES = {
    "default": Case(),
    "weights in registers": Case(weights_in_registers=True),
    "window, soft cap": Case(window=True, soft_cap=30.0),
    "dim 256": Case(heads=4, kvh=1, dim=256),
    "dim 64, odd sizes": Case(tok=301, ctx=1000, heads=4, kvh=4, dim=64),
    # as dim 128, but of another shape: of what a process has compiled before, ptxas says nothing
    "dim 80": Case(tok=1024, dim=80),
    # the slow leg
    "dim 256, weights in registers": Case(dim=256, weights_in_registers=True),
    "dim 64, weights in registers": Case(dim=64, weights_in_registers=True),
    "dim 16": Case(dim=16),
    "MQA, few tokens": Case(tok=7, ctx=129, heads=64, kvh=1),
    "long": Case(tok=32768, ctx=2**20, heads=8, kvh=1),
}


def compile_case(mesh: jax.sharding.Mesh, case: Case) -> jax.stages.Compiled:
    def program(q, k, v, q_req, q_pos, kv_req, kv_pos, window):
        return gpu.flash_partial(
            q, k, v, q_req, q_pos, kv_req, kv_pos, scale=0.1, window=window if case.window else None,
            soft_cap=case.soft_cap, weights_in_registers=case.weights_in_registers,
        )  # fmt: skip

    floats = [(case.tok, case.heads, case.dim), *[(case.ctx, case.kvh, case.dim)] * 2]
    integers = [*[(case.tok,)] * 2, *[(case.ctx,)] * 2, ()]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in floats]
    return compile_on(mesh, program, *shapes, *[jax.ShapeDtypeStruct(s, jnp.int32) for s in integers])


def main(names: list[str]) -> None:
    mesh = h200_mesh()
    for name in names:
        case, start = CASES[name], time.process_time()
        compiled, used = resources(lambda case=case: compile_case(mesh, case))
        report = {
            "name": name,
            "estimated_smem_bytes": gpu.smem_bytes(
                gpu.choose_sizes(case.dim + -case.dim % 64, None, None), case.dim + -case.dim % 64
            ),
            **used,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "input_bytes": 2 * (case.tok * case.heads + 2 * case.ctx * case.kvh) * case.dim,
            "compile_cpu_s": round(time.process_time() - start, 1),
        }
        print(json.dumps(report), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
