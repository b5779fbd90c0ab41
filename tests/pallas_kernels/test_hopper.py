"""What GPU kernels refuse before anything else: versions, devices, dtypes, dims."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import flash_partial, hopper, paged_partial
from pallas_kernels.hopper import MIN_JAX
from tests.pallas_kernels import cases

FLASH = next(case for case in cases.FLASH_CASES if case.name == "bf16 causal")
PAGED = next(case for case in cases.PAGED_CASES if case.name == "bf16")
OPS = {
    "flash_partial": (flash_partial.flash_partial, lambda: cases.flash_inputs(FLASH), FLASH.dim),
    "paged_partial": (paged_partial.paged_partial, lambda: cases.paged_inputs(PAGED), PAGED.dim),
}


@pytest.mark.parametrize(("version", "served"), [("0.10.2", False), ("0.11.1", False), ("0.11.2", True), ("1.0", True)])
def test_a_jax_too_old_is_refused_by_its_version(version: str, served: bool):
    if served:
        hopper.require_jax(version)
        return
    with pytest.raises(NotImplementedError, match=rf"jax: {version} is older than 0.11.2"):
        hopper.require_jax(version)


@pytest.mark.parametrize("op", OPS)
def test_where_the_kernel_refuses_the_blockwise_path_serves(op: str):
    """Here it always does: jax is too old, or the device is no GPU."""
    function, make_inputs, dim = OPS[op]
    inputs = make_inputs()
    reason = "device: a Hopper GPU, not cpu" if jax.__version_info__ >= MIN_JAX else "jax: .* is older than"
    with pytest.raises(ExceptionGroup) as caught:
        function(**inputs, scale=dim**-0.5, implementation="gpu")
    assert caught.group_contains(NotImplementedError, match=reason)
    served = jax.eval_shape(lambda: function(**inputs, scale=dim**-0.5, platform="gpu"))
    assert served.out.shape == inputs["q"].shape


@pytest.mark.parametrize(
    ("kind", "served"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA H20", True)]
    + [("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False), ("cpu", False)],
)
def test_hopper_is_known_by_name(kind: str, served: bool):
    assert hopper.is_hopper(kind) is served


def test_dtypes_and_dims():
    hopper.require_bfloat16(q=jnp.zeros(1, jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="kv_pages: bfloat16, not float32"):
        hopper.require_bfloat16(q=jnp.zeros(1, jnp.bfloat16), kv_pages=jnp.zeros(1))
    for dim in (64, 128, 256):
        hopper.require_dim("pool_dim", dim, 64)
    for dim in (0, 96, 320):
        with pytest.raises(NotImplementedError, match=f"pool_dim: a multiple of 64 up to 256, not {dim}"):
            hopper.require_dim("pool_dim", dim, 64)


def test_accumulators_cover_all_columns():
    assert hopper.acc_columns(64) == [slice(0, 64)]
    assert hopper.acc_columns(256) == [slice(0, 128), slice(128, 256)]
