"""Runs the TPU kernel of `paged_partial`, whole or broken on purpose, in the interpreter that detects races.

    python -m tests.pallas_kernels.paged_races none,eager,3 "dropped wait,on_wait,1"     (mutant, copies, draws)

Run as a program by `test_paged_tpu.py`: a run that fails may leave the interpreter's threads behind. Copies happen when
they start ("eager") or as late as may be ("on_wait"). Output: one JSON object for each word, with what became of it:
"race", "semaphore" (signals that nobody waited for), "numbers" (the partial is wrong).
"""

import contextlib
import io
import json
import os
import sys
from functools import partial
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # interpreted kernels spend most of their time being compiled
os.environ.setdefault("NPROC", "16")  # threads for callbacks that wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_partial import blockwise, tpu, tpu_fetch, tpu_kernel

PAGES, PAGE_TOKENS, ENTRIES, ROWS, QTOK = 48, 8, 300, 6, 2
WINDOW = 1500


def table(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Rows of any length, some empty, some with the same entries; partly filled pages in any order."""
    entries = np.stack([rng.integers(0, PAGES, ENTRIES), 8 * rng.permutation(ENTRIES), rng.integers(1, 9, ENTRIES)], 1)
    length = rng.integers(0, 40, ROWS) * rng.integers(0, 2, ROWS)
    start = rng.integers(0, ENTRIES - 40, ROWS)
    again = rng.integers(1, ROWS)
    start[again], length[again] = start[again - 1], length[again - 1]
    position = rng.integers(0, 8 * ENTRIES, (ROWS, 1)) + np.arange(QTOK)
    columns = {"entries": entries, "row_start": start, "row_len": length, "q_pos": position}
    return {name: jnp.asarray(a, jnp.int32) for name, a in columns.items()}


def interpreted(copies: str, **tables: jax.Array):
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=copies)
    sizes = {"unit_rows": 2, "step_units": 2, "block_pages": 4, "fold_pages": 2}
    return tpu.paged_partial(**tables, layer=1, scale=0.1, window=WINDOW, interpret=interpret, **sizes)


def waiting_for(num_pages):
    """`_wait` for `num_pages(size of the block)` pages only."""

    def wait(refs, half):
        one = lambda place, _: tpu_fetch.page_copy(refs, 0, half, place).wait()
        lax.fori_loop(0, num_pages(refs.block_size[half]), one, None)

    return wait


def page_copy_into_the_other_half(refs, page, half, place):
    source = refs.pool.at[refs.scalar[tpu_fetch.LAYER], page]
    return pltpu.make_async_copy(source, refs.buffer.at[1 - half, place], refs.fetched.at[half])


MUTANTS = {
    "none": {},
    "dropped wait": {(tpu_kernel, "_wait"): waiting_for(lambda size: 0)},
    "missing final wait": {(tpu_kernel, "_wait"): waiting_for(lambda size: size - 1)},
    "swapped slot": {
        (tpu_fetch, "page_copy"): page_copy_into_the_other_half,
        (tpu_kernel, "page_copy"): page_copy_into_the_other_half,
    },
}
"""Name -> what stands for what, as (module, name)."""


def signs_of(run, draws: int) -> list[str]:
    rng = np.random.default_rng(7)
    pool = jnp.asarray(rng.standard_normal((2, PAGES, 2, 2, PAGE_TOKENS, 128)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((ROWS, QTOK, 4, 128)), jnp.float32)
    said, right = io.StringIO(), True
    with contextlib.redirect_stdout(said):
        for _ in range(draws):
            tables = table(rng)
            want = blockwise.paged_partial(q, kv_pages=pool, layer=1, scale=0.1, window=WINDOW, **tables)
            try:
                got = jax.block_until_ready(run(q=q, kv_pages=pool, **tables))
            except jax.errors.JaxRuntimeError as error:  # newer versions raise what others print
                said.write(str(error))
                pltpu.reset_tpu_interpret_mode_state()
                break
            right &= all(np.allclose(a, b, rtol=2e-6, atol=2e-6) for a, b in zip(got, want, strict=True))
    signs = {"race": "RACE DETECTED" in said.getvalue(), "semaphore": "non-zero count" in said.getvalue()}
    return [sign for sign, seen in (signs | {"numbers": not right}).items() if seen]


def main(words: list[str]) -> None:
    for word in words:
        name, copies, draws = word.split(",")
        with contextlib.ExitStack() as stack:
            for (module, attribute), function in MUTANTS[name].items():
                stack.enter_context(mock.patch.object(module, attribute, function))
            signs = signs_of(jax.jit(partial(interpreted, copies)), int(draws))
        print(json.dumps({"word": word, "signs": signs}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # without waiting for threads of runs that failed
