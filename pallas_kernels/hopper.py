"""What the GPU kernels share: which jax they need, how tiles lie in shared memory, what a block may take of it.

They are written in Pallas Mosaic GPU for Hopper (wgmma, TMA). What it is not: a kernel (`*/gpu.py`).
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import current_device_kind

Ref = Any
"""What a kernel sees of an array or a barrier: Pallas's own types are narrower than what its functions take."""
MIN_JAX = (0, 11, 2)
"""The oldest jax whose Mosaic GPU these kernels were compiled with."""

SMEM_LIMIT_BYTES = 227 * 1024
"""Of one block, on H100 and H200."""
SWIZZLE_DIM = 64
"""The elements of bfloat16 that memory is swizzled over: head_dim in shared memory is a multiple of it, since with less
the compiler finds no layout."""
MAX_DIM = 256
MAX_ACC_DIM = 128
"""Columns of one accumulator: as many registers as a thread can spare twice."""
ROWS = 64
"""Rows of one wgmma: those of a score tile that a warpgroup works on."""
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
NO_WINDOW = 2**30


def require_jax(version: str | None = None) -> None:
    """Raises NotImplementedError where jax (`version`: this one's) is older than the kernels need."""
    version = version or jax.__version__
    if tuple(int(n) for n in version.split(".")[:3]) < MIN_JAX:
        raise NotImplementedError(f"jax: {version} is older than {'.'.join(map(str, MIN_JAX))}, which the kernel needs")


def is_hopper(device_kind: str) -> bool:
    """Whether a device that calls itself so is a Hopper GPU."""
    return re.search(r"\b(G?H[128]00|H20)\b", device_kind) is not None


def require_hopper() -> None:
    """Raises NotImplementedError where the program traced now is for another device than a Hopper GPU."""
    kind = current_device_kind()
    if not is_hopper(kind):
        raise NotImplementedError(f"device: a Hopper GPU, not {kind}")


def require_bfloat16(**arrays: jax.Array) -> None:
    """Raises NotImplementedError naming the first array that is not bfloat16: there is no wgmma for float32."""
    for name, array in arrays.items():
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{name}: bfloat16, not {array.dtype}")


def require_dim(name: str, dim: int, unit: int) -> None:
    """Raises NotImplementedError for a head_dim that is no multiple of `unit`, or larger than MAX_DIM."""
    if dim % unit or not unit <= dim <= MAX_DIM:
        raise NotImplementedError(f"{name}: a multiple of {unit} up to {MAX_DIM}, not {dim}")


def tile(shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16):
    """An array in shared memory as wgmma and TMA take it: swizzled as widely as its minor dimension allows."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def acc_columns(dim: int) -> list[slice]:
    """The columns of each accumulator that `dim` is spread over."""
    return [slice(base, min(base + MAX_ACC_DIM, dim)) for base in range(0, dim, MAX_ACC_DIM)]


def empty_acc(dim: int) -> tuple[jax.Array, ...]:
    """Accumulators of zeros, f32 `[ROWS, columns]` each."""
    zeros = lambda columns: jnp.zeros((ROWS, columns.stop - columns.start), jnp.float32)
    return tuple(plgpu.layout_cast(zeros(columns), plgpu.Layout.WGMMA) for columns in acc_columns(dim))


def load(source: Ref, layout: Any) -> jax.Array:
    """From GMEM straight into registers."""
    return plgpu.load(source, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]: an older jax wants idx


def rows_to_tile(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value for each row, repeated along the row."""
    return jax.lax.broadcast_in_dim(column, shape, [0])


def columns_to_tile(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value for each column, repeated down the column."""
    return jax.lax.broadcast_in_dim(row, shape, [1])
