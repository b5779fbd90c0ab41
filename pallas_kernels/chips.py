"""What the TPU kernels must know of a chip to choose block sizes: memories of a core, the width of its matrix unit.

Figures are those of JAX's own table of TPUs; a core is what one Pallas program runs on. What it is not: peak rates
(`loong_jax/cost/hardware.py`).
"""

from typing import NamedTuple

import jax

MIB = 2**20

LANES = 128
"""Elements in the minor dimension of a register or tile: arrays in VMEM are padded to multiples of it."""


class Chip(NamedTuple):
    """One TensorCore. `mxu`: rows and columns that fill its matrix unit."""

    name: str
    device_kinds: tuple[str, ...]  # as JAX names them
    vmem_bytes: int
    smem_bytes: int
    mxu: int

    @property
    def vmem_limit_bytes(self) -> int:
        """What a kernel may ask for; the compiler keeps the rest for spills and for the programs around it."""
        return self.vmem_bytes * 3 // 4

    @property
    def smem_limit_bytes(self) -> int:
        """What a kernel's prefetched scalars may take together."""
        return self.smem_bytes // 2


CHIPS = (
    Chip("v4", ("TPU v4",), 16 * MIB, MIB, 128),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 128 * MIB, MIB, 128),
    Chip("v5p", ("TPU v5", "TPU v5p"), 64 * MIB, MIB, 128),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 128 * MIB, MIB, 256),
    Chip("tpu7x", ("TPU7x",), 64 * MIB, MIB, 256),
)

UNKNOWN = Chip("unknown", (), 16 * MIB, MIB, 128)
"""The least of each: what is chosen for it fits everywhere, so it also serves where no TPU is named."""


def chip_of(device_kind: str) -> Chip:
    """The record of a device kind, `UNKNOWN` for one that has none."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), UNKNOWN)


def current_device_kind() -> str:
    """The device that a program traced now is for, as JAX names its kind.

    It is that of the mesh in force, which may be of a topology that is not at hand; outside a mesh, this process's
    default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def current_chip() -> Chip:
    """The chip that a program traced now is for."""
    return chip_of(current_device_kind())
