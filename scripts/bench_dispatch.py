#!/usr/bin/env python3
"""What one decode step costs the thread that dispatches it, by the way its metadata argument is handed over.

The step has the shape of the engine's: 34 weight leaves, a donated pool, one packed int32 array. CPU time is that of
the calling thread (`time.thread_time`): what an engine thread cannot spend on anything else. The numbers behind
docs/dispatch.md come from here.

    scripts/bench_dispatch.py [--dops 1 8] [--steps 200]
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=16")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from loong_jax.programs import Programs  # noqa: E402
from loong_jax.types import Phase, Program  # noqa: E402
from tests.support.small_llama import SmallLlama  # noqa: E402


def measure(label: str, call: Callable[[], jax.Array], num_steps: int) -> None:
    for _ in range(5):
        jax.block_until_ready(call())
    cpu_s, wall_s = [], []
    for _ in range(num_steps):
        cpu, wall = time.thread_time(), time.perf_counter()
        out = call()
        cpu_s.append(time.thread_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
        jax.block_until_ready(out)
    median = lambda values: sorted(values)[len(values) // 2] * 1e6
    print(f"  {label:42s} {median(cpu_s):7.0f} us CPU  {median(wall_s):7.0f} us wall")


def bench(dop: int, num_steps: int) -> None:
    engine = SmallLlama(jax.devices()[: dop + 1])
    program, home, instances = Program(Phase.DECODE, dop, 8), tuple(range(dop)), tuple(range(1, dop + 1))
    programs = Programs(engine.build, engine.mesh_of, None, lambda event: None, "bench")
    programs.compile(program, home)
    retargeted, compiled = programs.compile(program, instances), programs.compile(program, home)
    programs.close()
    for label, where, executable in (("compiled", home, compiled), ("retargeted", instances, retargeted)):
        mesh = engine.mesh_of(where)
        weights, pool, meta = engine.inputs(program, where)
        sharding = NamedSharding(mesh, PartitionSpec("sp"))
        devices = list(mesh.devices.flat)
        step = engine.build(program)
        jitted = jax.jit(step.function, donate_argnums=step.donate)
        resident = jax.device_put(meta, sharding)
        state = [pool]

        def call(function: Callable, argument, weights=weights, state=state) -> jax.Array:
            state[0], token = function(weights, state[0], argument)
            return token

        def through_jit(mesh=mesh, jitted=jitted, meta=meta, call=call) -> jax.Array:
            with jax.set_mesh(mesh):
                return call(jitted, meta)

        def by_shards(meta=meta, devices=devices, sharding=sharding) -> jax.Array:
            rows = [jax.device_put(meta[i : i + 1], device) for i, device in enumerate(devices)]
            return jax.make_array_from_single_device_arrays(meta.shape, sharding, rows)

        print(f"DoP {dop}, {label}, metadata {meta.shape} int32")
        ways = {
            "resident (a floor: nothing is handed over)": lambda e=executable, r=resident, c=call: c(e, r),
            "numpy, as it is": lambda e=executable, m=meta, c=call: c(e, m),
            "device_put(numpy, sharding)": lambda e=executable, m=meta, s=sharding, c=call: c(e, jax.device_put(m, s)),
            "a device_put a shard, then assembled": lambda e=executable, b=by_shards, c=call: c(e, b()),
            "the jitted function, numpy": through_jit,
        }
        for way, one_call in ways.items():
            measure(way, one_call, num_steps)


def aliases(dop: int) -> bool:
    """Does a step read its numpy argument after the call has returned?"""
    engine = SmallLlama(jax.devices()[:dop])
    instances, program = tuple(range(dop)), Program(Phase.PREFILL, dop, 512)
    programs = Programs(engine.build, engine.mesh_of, None, lambda event: None, "bench")
    compiled = programs.compile(program, instances)
    programs.close()
    weights, pool, meta = engine.inputs(program, instances)
    room = np.empty(meta.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64  # XLA takes over, without a copy, host memory that is aligned to its liking
    aligned = room[start : start + meta.nbytes].view(np.int32).reshape(meta.shape)
    tokens = []
    for overwrite in (False, True):
        aligned[:] = meta
        pool, token = compiled(weights, pool, aligned)
        if overwrite:
            aligned[:] = 1
        tokens.append((np.asarray(token), np.asarray(pool)))
    return any(not np.array_equal(a, b) for a, b in zip(*tokens, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dops", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for dop in options.dops:
        bench(dop, options.steps)
        print(f"  overwriting the numpy argument after the call changes the step: {aliases(dop)}")


if __name__ == "__main__":
    main()
