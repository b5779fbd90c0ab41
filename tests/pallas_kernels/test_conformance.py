"""Every implementation of every op against the dense answer, over `cases.py`.

A new implementation joins its op's table, as it runs without its hardware, and names the cases it refuses in
`UNSUPPORTED`.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_partial as flash
from pallas_kernels import paged_partial as paged
from pallas_kernels.chips import LANES
from pallas_kernels.hopper import MIN_JAX, SWIZZLE_DIM
from pallas_kernels.partial import NEG, Partial
from tests.pallas_kernels import cases

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
"""Relative to the largest magnitude of the answer (at least 1), by the dtype of q."""


def paged_on_tpu(kv_pages: jax.Array, **kwargs) -> Partial:
    """The TPU kernel in TPU's interpreter, over a pool as TPU has it: padded with zeros to lanes."""
    kv_pages = jnp.pad(kv_pages, [(0, 0)] * 5 + [(0, -kv_pages.shape[-1] % LANES)])
    return paged.IMPLEMENTATIONS["tpu"](kv_pages=kv_pages, **kwargs, interpret=pltpu.InterpretParams())


def paged_on_gpu(kv_pages: jax.Array, **kwargs) -> Partial:
    """The GPU kernel in GPU's interpreter, over a pool as GPUs have it: padded with zeros to what a tile takes."""
    kv_pages = jnp.pad(kv_pages, [(0, 0)] * 5 + [(0, -kv_pages.shape[-1] % SWIZZLE_DIM)])
    interpret = plgpu.InterpretGPUParams()
    return paged.IMPLEMENTATIONS["gpu"](kv_pages=kv_pages, **kwargs, interpret=interpret, shares=2)


FLASH = {
    "tpu": partial(flash.IMPLEMENTATIONS["tpu"], interpret=True, block_q=128, block_kv=128),
    "blockwise": flash.IMPLEMENTATIONS["blockwise"],
    "reference": flash.IMPLEMENTATIONS["reference"],
}
PAGED = {
    "tpu": paged_on_tpu,
    "blockwise": paged.IMPLEMENTATIONS["blockwise"],
    "reference": paged.IMPLEMENTATIONS["reference"],
}
"""The functions to test; kernels are interpreted, in small blocks so that there are several."""

if jax.__version_info__ >= MIN_JAX:  # on older ones they refuse everything: `test_gpu.py`
    FLASH["gpu"] = partial(flash.IMPLEMENTATIONS["gpu"], interpret=plgpu.InterpretGPUParams())
    PAGED["gpu"] = paged_on_gpu

UNSUPPORTED: dict[tuple[str, str], frozenset[str]] = {
    # pages of few tokens are read as rows of the pool; for these that would be a copy of it
    ("paged_partial", "tpu"): frozenset({"page 3", "dim 256, page 2"}),
    # wgmma has no float32, TMA no pages of less than a tile of shared memory
    ("flash_partial", "gpu"): frozenset(case.name for case in cases.FLASH_CASES if case.dtype != "bfloat16"),
    ("paged_partial", "gpu"): frozenset(
        case.name
        for case in cases.PAGED_CASES
        if "float32" in (case.dtype, case.storage) or case.page_tokens not in (8, 16, 32, 64, 128)
    ),
}
"""(op, implementation) -> names of the cases it refuses."""

QUICK = {
    ("paged_partial", "tpu"): frozenset(
        {
            "rows", "all empty", "gaps", "queries before all", "gather-q behind, gaps", "page 1", "page 2", "page 3",
            "page 128", "window", "soft cap", "MHA", "dim 96", "dim 256", "dim 256, page 2", "bits, gaps",
            "rows of one request, gaps, window", "1M tokens, window",
        }
    ),
    ("flash_partial", "gpu"): frozenset({"bf16 striped", "bf16 dim 80, window, soft cap", "bf16 one query, dim 256"}),
    ("paged_partial", "gpu"): frozenset({"bits", "bf16 page 8", "bf16 gather-q, gaps, window"}),
}  # fmt: skip
"""(op, implementation) -> names of the cases outside the slow leg, of one that takes seconds for each."""


def grid(op: str, table: dict, every: list):
    """Every case on every implementation."""
    params = []
    for case, name in itertools.product(every, table):
        marks = pytest.mark.slow if case.name not in QUICK.get((op, name), {case.name}) else ()
        params.append(pytest.param(case, name, marks=marks, id=f"{case.name}-{name}"))
    return pytest.mark.parametrize(("case", "implementation"), params)


def worst(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Fails naming the worst element of `got`."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, not {want.shape}"
    error = np.where(np.isfinite(got), np.abs(got - want), np.inf) / max(1.0, np.abs(want).max(initial=0.0))
    if error.size and error.max() > tolerance:
        at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        share = (error > tolerance).mean()
        pytest.fail(
            f"{name}{list(at)} is {got[at]:.9g}, not {want[at]:.9g}: relative error {error[at]:.3g} > {tolerance:g}; "
            f"{share:.2%} of {error.size} elements are off"
        )


def check(got: Partial, want: Partial, tolerance: float) -> None:
    lse = np.asarray(got.lse)
    hidden = want.lse == NEG
    assert got.out.dtype == got.lse.dtype == np.float32
    worst("lse of empty", np.where(hidden, lse / -NEG, -1.0), np.full(lse.shape, -1.0), 1e-7)
    worst("lse", np.where(hidden, 0.0, lse), np.where(hidden, 0.0, want.lse), tolerance)
    worst("out of empty", np.where(hidden[..., None], got.out, 0.0), np.zeros(got.out.shape), 0.0)
    worst("out", got.out, want.out, tolerance)


def run(op: str, table: dict, implementation: str, case, inputs: dict) -> Partial:
    """Jitted with all data traced; options static."""
    options = {"scale": case.dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}
    function = jax.jit(lambda kw: table[implementation](**kw, **options))
    if case.name in UNSUPPORTED.get((op, implementation), ()):
        with pytest.raises(NotImplementedError):
            function(inputs)
        pytest.skip("declared unsupported")
    return function(inputs)


@grid("flash_partial", FLASH, cases.FLASH_CASES)
def test_flash_partial(case: cases.FlashCase, implementation: str):
    inputs = cases.flash_inputs(case)
    got = run("flash_partial", FLASH, implementation, case, inputs)
    check(got, cases.dense_flash(case, inputs, case.dim**-0.5), TOLERANCE[case.dtype])


def test_a_window_may_be_data():
    """As where scanned layers differ: a traced window gives what the static one does."""
    flash_case = next(case for case in cases.FLASH_CASES if case.window and case.dtype == "float32")
    paged_case = next(case for case in cases.PAGED_CASES if case.window and case.dtype == "float32")
    for table, case, inputs in (
        (FLASH, flash_case, cases.flash_inputs(flash_case)),
        (PAGED, paged_case, cases.paged_inputs(paged_case)),
    ):
        for name, function in table.items():
            if name == "gpu":  # no float32; there a window is data in any case
                continue
            options = {"scale": case.dim**-0.5, "soft_cap": case.soft_cap}
            traced = jax.jit(lambda kw, window, f=function, o=options: f(**kw, **o, window=window))
            static = jax.jit(lambda kw, f=function, o=options, w=case.window: f(**kw, **o, window=w))
            for got, want in zip(traced(inputs, jnp.int32(case.window)), static(inputs), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@grid("paged_partial", PAGED, cases.PAGED_CASES)
def test_paged_partial(case: cases.PagedCase, implementation: str):
    inputs = cases.paged_inputs(case)
    got = run("paged_partial", PAGED, implementation, case, inputs)
    check(got, cases.dense_paged(case, inputs, case.dim**-0.5), TOLERANCE[case.dtype])
