"""The chip a program is traced for: that of the mesh in force, whatever this process runs on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.chips import CHIPS, UNKNOWN, chip_of, current_chip


def test_kinds_name_one_chip_each():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip_of(kind) is chip for chip in CHIPS for kind in chip.device_kinds)


def test_what_fits_the_unknown_chip_fits_all():
    assert chip_of("abacus") is UNKNOWN
    for chip in CHIPS:
        assert UNKNOWN.vmem_limit_bytes <= chip.vmem_limit_bytes < chip.vmem_bytes
        assert UNKNOWN.smem_limit_bytes <= chip.smem_limit_bytes < chip.smem_bytes
        assert UNKNOWN.mxu <= chip.mxu


def test_without_a_mesh_it_is_this_process_s_device():
    assert current_chip() is chip_of(jax.devices()[0].device_kind)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_mesh_in_force_decides(chip):
    device = AbstractDevice(device_kind=chip.device_kinds[0], num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("sp",), (AxisType.Auto,), abstract_device=device)
    found = []

    def program(x):
        found.append(current_chip())
        return x

    mapped = jax.shard_map(program, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"))
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert found == [chip]
