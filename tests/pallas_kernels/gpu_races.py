"""Runs the GPU kernels, whole or broken on purpose, in the interpreter that detects races.

    python -m tests.pallas_kernels.gpu_races flash,none,3 "paged,dropped wait,1"     (op, mutant, draws)

Run as a program by `test_gpu_races.py`: a run that fails may leave the interpreter's threads behind. Output: one JSON
object for each word, with what became of it: "race" (the interpreter says so, or stops the kernel), "numbers" (the
partial is wrong). What it is not: hardware, where the warps of a warpgroup may be apart.
"""

import contextlib
import io
import json
import os
import sys
from functools import partial
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "16")  # threads for callbacks that wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_partial import blockwise as flash_blockwise
from pallas_kernels.flash_partial import gpu as flash_gpu
from pallas_kernels.paged_partial import blockwise as paged_blockwise
from pallas_kernels.paged_partial import gpu as paged_gpu
from pallas_kernels.paged_partial import gpu_kernel as paged_kernel

RACES = plgpu.InterpretGPUParams(detect_races=True)
PAGES, PAGE_TOKENS, ENTRIES, ROWS, DIM = 24, 32, 40, 3, 64


def flash_draw(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Any tokens of two requests on either side: four blocks of keys through two stages."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    integers = lambda most, n: jnp.asarray(rng.integers(-1, most, n), jnp.int32)
    return {
        **{"q": normal(128, 1, DIM), "k": normal(256, 1, DIM), "v": normal(256, 1, DIM)},
        **{"q_req": integers(2, 128), "q_pos": integers(999, 128)},
        **{"kv_req": integers(2, 256), "kv_pos": integers(999, 256)},
    }


def paged_draw(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Rows of any length, some empty, partly filled pages in any order."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    entries = np.stack(
        [rng.integers(0, PAGES, ENTRIES), 32 * rng.permutation(ENTRIES), rng.integers(1, 33, ENTRIES)], axis=1
    )
    columns = {
        "entries": entries,
        "row_start": rng.integers(0, ENTRIES - 20, ROWS),
        "row_len": rng.integers(8, 20, ROWS) * np.array([1, 0, 1]),
        "q_pos": rng.integers(0, 32 * ENTRIES, (ROWS, 1)) + np.arange(2),
    }
    arrays = {name: jnp.asarray(a, jnp.int32) for name, a in columns.items()}
    return {"q": normal(ROWS, 2, 2, DIM), "kv_pages": normal(1, PAGES, 2, 1, PAGE_TOKENS, DIM), **arrays}


OPS = {
    "flash": (
        flash_gpu,
        partial(flash_gpu.flash_partial, scale=0.3, window=700, block_kv=64, stages=2, interpret=RACES),
        partial(flash_blockwise.flash_partial, scale=0.3, window=700),
        flash_draw,
    ),
    "paged": (
        paged_kernel,
        partial(paged_gpu.paged_partial, layer=0, scale=0.3, window=700, stages=2, shares=1, interpret=RACES),
        partial(paged_blockwise.paged_partial, layer=0, scale=0.3, window=700),
        paged_draw,
    ),
}
"""Name -> the module with the kernel, the kernel, what is right, inputs."""


class Without:
    """`plgpu`, whose waits for barriers of some names are left out. `named` stands for `Refs`."""

    def __init__(self, module, *names: str):
        self.refs, self.names, self.left_out = module.Refs, names, []

    def named(self, *refs):
        made = self.refs(*refs)
        self.left_out = [getattr(made, name) for name in self.names]
        return made

    def barrier_wait(self, barrier):
        if not any(barrier.ref is ref for ref in self.left_out if hasattr(barrier, "ref")):
            plgpu.barrier_wait(barrier)

    def __getattr__(self, name):
        return getattr(plgpu, name)


def other_place(place):
    """`_place` for the stage after."""

    def moved(target, options, stage, *rest):
        return place(target, options, lax.rem(stage + 1, jnp.int32(2)), *rest)

    return moved


def mutants(module) -> dict[str, dict[str, object]]:
    """Name -> what stands for what in the module."""
    no_wait, no_final_wait = Without(module, "v_there"), Without(module, "k_used", "v_used")
    return {
        "none": {},
        "dropped wait": {"plgpu": no_wait, "Refs": no_wait.named},
        "missing final wait": {"plgpu": no_final_wait, "Refs": no_final_wait.named},
        "swapped slot": {"_place": other_place(module._place)},
    }


def signs_of(run, right, draw, draws: int) -> list[str]:
    rng = np.random.default_rng(7)
    said, same, stopped = io.StringIO(), True, False
    with contextlib.redirect_stdout(said):
        for _ in range(draws):
            inputs = draw(rng)
            want = right(**inputs)
            try:
                got = jax.block_until_ready(run(**inputs))
            except jax.errors.JaxRuntimeError as error:
                said.write(str(error))
                stopped = True
                break
            same &= all(np.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(got, want, strict=True))
    race = stopped or "RACE DETECTED" in said.getvalue()
    return [sign for sign, seen in (("race", race), ("numbers", not same)) if seen]


def main(words: list[str]) -> None:
    for word in words:
        op, mutant, draws = word.split(",")
        module, kernel, right, draw = OPS[op]
        with contextlib.ExitStack() as stack:
            for attribute, stand_in in mutants(module)[mutant].items():
                stack.enter_context(mock.patch.object(module, attribute, stand_in))
            signs = signs_of(jax.jit(kernel), jax.jit(right), draw, int(draws))
        print(json.dumps({"word": word, "signs": signs}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # without waiting for threads of runs that failed
