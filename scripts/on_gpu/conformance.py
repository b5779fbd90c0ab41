"""The conformance cases of both kernels, executed: the dense answer in float64 against what the device computes.

The cases, tolerances and refusals are those of `tests/pallas_kernels`. On a CPU the blockwise path stands in.
"""

import jax
import jax.numpy as jnp
from on_gpu.figures import Figures

from pallas_kernels import flash_partial as flash
from pallas_kernels import paged_partial as paged
from pallas_kernels.hopper import SWIZZLE_DIM
from tests.pallas_kernels import cases
from tests.pallas_kernels.test_conformance import QUICK, TOLERANCE, UNSUPPORTED, check

OPS = {"flash_partial": cases.FLASH_CASES, "paged_partial": cases.PAGED_CASES}
FORMS = {"": {}, " in registers": {"weights_in_registers": True}}
"""Of flash_partial: the second is the one that no interpreter runs."""
NUM_TINY = 2


def names(tiny: bool) -> list[str]:
    """Those of the suite first: they differ most from each other."""
    out = []
    for op, every in OPS.items():
        served = [case.name for case in every if case.name not in UNSUPPORTED[op, "gpu"]]
        served.sort(key=lambda name, op=op: name not in QUICK[op, "gpu"])
        forms = FORMS if op == "flash_partial" and not tiny else ("",)
        out += [f"{op} {name}{form}" for name in served[: NUM_TINY if tiny else None] for form in forms]
    return out


def measure(name: str, tiny: bool) -> Figures:
    """Raises AssertionError or pytest's failure with the worst element where the answer is wrong."""
    op, _, rest = name.partition(" ")
    form = next(form for form in reversed(FORMS) if rest.endswith(form))
    case = next(case for case in OPS[op] if case.name == rest.removesuffix(form))
    implementation = "blockwise" if jax.default_backend() == "cpu" else "gpu"
    options = {"scale": case.dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}
    if op == "flash_partial":
        inputs = cases.flash_inputs(case)
        want = cases.dense_flash(case, inputs, options["scale"])
        function = flash.IMPLEMENTATIONS[implementation]
    else:
        inputs = cases.paged_inputs(case)
        want = cases.dense_paged(case, inputs, options["scale"])
        inputs["kv_pages"] = _whole_tiles(inputs["kv_pages"])
        function = paged.IMPLEMENTATIONS[implementation]
    got = jax.jit(lambda arrays: function(**arrays, **options, **FORMS[form]))(inputs)
    check(got, want, TOLERANCE[case.dtype])
    return Figures({"largest_error": float(jnp.abs(got.out - want.out).max(initial=0.0))})


def _whole_tiles(pool: jax.Array) -> jax.Array:
    """As pools on GPUs are: padded with zeros to what a tile takes."""
    return jnp.pad(pool, [(0, 0)] * 5 + [(0, -pool.shape[-1] % SWIZZLE_DIM)])
