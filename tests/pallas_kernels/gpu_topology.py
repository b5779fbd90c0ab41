"""An H200 that is not there, to compile for: JAX's GPU compiler runs on any machine that has its wheel and ptxas.

    pip install jax-cuda13-plugin jax-cuda13-pjrt     (no CUDA, no driver; `scripts/test --python python3.12` does it)
    pip install nvidia-cuda-nvcc                      (320 MB; where no CUDA has put ptxas on the PATH)

What it is not: a way to run anything.
"""

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
"""Published figures of an H200, in the words of XLA's compiler."""


def find_ptxas() -> str | None:
    """NVIDIA's assembler, of the PATH or of the wheel nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    places = [str(Path(place) / "cu13" / "bin") for place in (spec.submodule_search_locations or ())] if spec else []
    return shutil.which("ptxas") or shutil.which("ptxas", path=os.pathsep.join(places))


def what_is_missing() -> str:
    """Why nothing can be compiled for GPUs here; empty if it can."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax's CUDA plugin is missing: pip install jax-cuda13-plugin jax-cuda13-pjrt"
    if find_ptxas() is None:
        return "ptxas is missing: pip install nvidia-cuda-nvcc, or CUDA"
    return ""


def h200_mesh(num_devices: int = 1) -> Mesh:
    """A mesh ("sp",) of H200s of one host. Needs JAX_PLATFORMS=cpu, before jax starts."""
    assert os.environ.get("JAX_PLATFORMS") == "cpu", "a GPU that is there has its own compiler"
    jax.devices()  # finds the plugin
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x8", target_config=CONFIG
    )
    return Mesh(np.array(topology.devices[:num_devices]), ("sp",))


def compile_on(
    mesh: Mesh, program, *shapes: jax.ShapeDtypeStruct, donate: int | tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`program` on every device of the mesh, all arrays replicated."""
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated) for s in shapes]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=donate).lower(*placed).compile()


def resources(compile_it: Callable[[], jax.stages.Compiled]) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """What `compile_it()` gives, and what ptxas said of the Mosaic kernels in it: the most registers of a thread, bytes
    spilled, bytes of shared memory. Compilers write that to the process's own outputs, so these are caught."""
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    sys.stdout.flush()
    with tempfile.TemporaryFile() as said:
        kept = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            compiled = compile_it()
            sys.stdout.flush()
        finally:
            for stream, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, stream)
                os.close(descriptor)
        said.seek(0)
        text = said.read().decode(errors="replace")
    most = lambda pattern: max((int(n) for n in re.findall(pattern, text)), default=-1)
    return compiled, {
        "registers": most(r"Used (\d+) registers"),
        "spill_bytes": most(r"(\d+) bytes spill"),
        "smem_bytes": most(r"smem_scratch_bytes=(\d+)"),
    }
