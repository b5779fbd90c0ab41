"""Machines to compile for that are not there: slices of TPUs, and nodes of GPUs.

What it is: from a name as in "v5e:2x4" or "h200:8" to devices that a compiler knows. What it is not: their speed
(`loong_jax/cost/hardware.py`), or the making of instances (`loong_jax/esp/groups.py`).
"""

import importlib.util
import re
import shutil
from typing import NamedTuple

from jax.experimental import topologies

from loong_jax.cost.hardware import Hardware
from loong_jax.cost.hardware import hardware as hardware_named
from loong_jax.retarget import Device

TPUS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
"""Chips, and the dimensions of their slices."""
GPUS = ("h100", "h200")
MAX_CHIPS = 4096


class TargetError(ValueError):
    """A machine that cannot be compiled for. The message names the field."""


class Target(NamedTuple):
    """`platform`: "tpu" or "gpu"; `devices`: all of the machine's."""

    name: str
    platform: str
    devices: list[Device]
    hardware: Hardware


def target(name: str) -> Target:
    """Raises TargetError for a name that says no machine, one the compiler does not know, or a missing compiler."""
    known = f"as in v5e:2x4, v5p:2x2x2 or h200:8; there are {', '.join((*TPUS, *GPUS))}"
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise TargetError(f"topology: {name!r} is no machine and size, {known}")
    chip, sizes = found[1], [int(size) for size in found[2].split("x")]
    if chip not in (*TPUS, *GPUS):
        raise TargetError(f"topology: {chip!r} is not known, {known}")
    wanted = TPUS.get(chip, 1)
    if len(sizes) != wanted:
        raise TargetError(f"topology: {name!r}: a size of {chip} has {wanted} dimensions, {known}")
    num_chips = 1
    for size in sizes:
        num_chips *= size
    if not 1 <= num_chips <= MAX_CHIPS:
        raise TargetError(f"topology: {name!r} is not from 1 to {MAX_CHIPS} chips")
    if chip in GPUS:
        return Target(name, "gpu", _gpus(name, chip, num_chips), hardware_named(chip.upper()))
    return Target(name, "tpu", _tpus(name), hardware_named(chip))


def _tpus(name: str) -> list[Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError("topology: TPUs need libtpu's compiler: pip install 'loong-jax[tpu]'")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jaxlib's errors of topologies have no common class
        raise TargetError(f"topology: the compiler does not know {name!r}: {str(error)[:200]}") from error


def missing_for_gpus() -> str | None:
    """What compiling for GPUs lacks here, in words."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
        return "the CUDA plugin of JAX is not installed: pip install jax-cuda13-plugin"
    return None if shutil.which("ptxas") else "ptxas is not on the PATH: it comes with the CUDA toolkit"


def _gpus(name: str, chip: str, num_devices: int) -> list[Device]:
    if missing := missing_for_gpus():
        raise TargetError(f"topology: {missing}")
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=chip, topology=f"1x1x{num_devices}", target_config=_hopper(chip)
        )
    except Exception as error:  # as above
        raise TargetError(f"topology: the compiler does not know {name!r}: {str(error)[:200]}") from error
    return list(described.devices)


def _hopper(chip: str) -> str:
    """What XLA asks of a GPU, from NVIDIA's data sheets of the SXM parts, as the text of its `GpuTargetConfigProto`."""
    bandwidth, memory = {"h100": (3_350_000_000_000, 80), "h200": (4_800_000_000_000, 141)}[chip]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": 228 << 10,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": 50 << 20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": memory * 10**9,
        "shared_memory_per_block_optin": 227 << 10,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"
    return (
        f'gpu_device_info {{ {fields} {capability} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'runtime_version {{ major: 13 }} device_description_str: "NVIDIA {chip.upper()}"'
    )
