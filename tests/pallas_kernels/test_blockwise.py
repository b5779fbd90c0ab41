"""What the blockwise paths promise beyond right answers: cost that follows the data, and use inside any program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_partial as flash
from pallas_kernels import paged_partial as paged
from pallas_kernels.paged_partial.blockwise import STEP_BYTES
from pallas_kernels.partial import Partial
from tests.pallas_kernels import cases
from tests.pallas_kernels.test_conformance import check

FLASH = cases.FlashCase("nested", cases.striped, tok=96, ctx=128)
PAGED = cases.PagedCase("nested", (100, 0, 33), gaps=True)


def call_flash(arrays):
    return flash.flash_partial(**arrays, scale=FLASH.dim**-0.5, implementation="blockwise")


def call_paged(arrays):
    return paged.paged_partial(**arrays, scale=PAGED.dim**-0.5, implementation="blockwise")


FLASH_INPUTS, PAGED_INPUTS = cases.flash_inputs(FLASH), cases.paged_inputs(PAGED)
OPS = {
    "flash": (call_flash, FLASH_INPUTS, cases.dense_flash(FLASH, FLASH_INPUTS, FLASH.dim**-0.5)),
    "paged": (call_paged, PAGED_INPUTS, cases.dense_paged(PAGED, PAGED_INPUTS, PAGED.dim**-0.5)),
}


@pytest.mark.parametrize("op", OPS)
def test_inside_scan_and_a_loop_of_dynamic_length(op):
    function, arrays, want = OPS[op]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), want)

    @jax.jit
    def program(arrays, trips):
        def step(_, __):
            return lax.fori_loop(0, trips, lambda i, _: function(arrays), zeros), None

        return lax.scan(step, zeros, None, length=2)[0]

    check(program(arrays, jnp.int32(2)), want, 2e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("varying", [{"q"}, {"q", "k", "v", "kv_pages"}])
def test_inside_shard_map_with_checked_axes(op, varying):
    """Whatever varies over the mesh and whatever does not: loop carries must agree."""
    function, arrays, want = OPS[op]
    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",))
    specs = {name: P("sp") if name in varying else P() for name in arrays}
    stacked = {name: jnp.stack([a, a]) if name in varying else a for name, a in arrays.items()}

    def program(arrays):
        arrays = {name: a[0] if name in varying else a for name, a in arrays.items()}
        return jax.tree.map(lambda a: a[None], function(arrays))

    mapped = jax.shard_map(program, mesh=mesh, in_specs=(specs,), out_specs=P("sp"))
    got = jax.jit(mapped)(stacked)
    for rank in range(2):
        check(Partial(got.out[rank], got.lse[rank]), want, 2e-6)


def test_paged_memory_is_that_of_a_step_whatever_the_pool():
    def temp_bytes(num_pages):
        pool = jax.ShapeDtypeStruct((8, num_pages, 2, 2, 16, 64), jnp.uint16)
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in OPS["paged"][1].items()}
        return jax.jit(call_paged).lower(shapes | {"kv_pages": pool}).compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(512), temp_bytes(4096)
    assert small == large < 4 * STEP_BYTES
