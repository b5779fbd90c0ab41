"""The tensors of a folder made by `loong convert`: an Orbax checkpoint in `weights/`.

What it is: one of the readers behind `leaves.Tensors`. Orbax keeps each array as Zarr (version 2) in a folder of its
own, and `convert.py` has it write the chunks uncompressed, cut along the axis that tensor parallelism slices. So a
slice is read from the few chunks that hold it, by plain reads of regular files, and no more than it asks for.
What it is not: a reader of any Orbax checkpoint; others are refused by what they do differently.
"""

import math
import os
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import msgspec
import numpy as np

from loong_jax.model.untrusted import (
    CheckpointError,
    is_sizes,
    is_there,
    locate,
    opened,
    read_exactly,
    read_object,
    shown,
)

WEIGHTS_FOLDER = "weights"
ORBAX_METADATA = "_METADATA"
ZARR_METADATA = ".zarray"
ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16"}
_MAX_CHUNKS = 65536
_ZARR_FIELDS = {
    "zarr_format": 2,
    "compressor": None,
    "filters": None,
    "order": "C",
    "dimension_separator": ".",
}


class _Array(msgspec.Struct, frozen=True):
    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str


def is_orbax(directory: str | Path) -> bool:
    """Whether a folder was made by `loong convert`, or says so."""
    return is_there(Path(directory), WEIGHTS_FOLDER)


class OrbaxReader:
    """The tensors of a converted checkpoint folder. A context manager."""

    def __init__(self, directory: str | Path):
        self._weights = _folder(Path(directory), WEIGHTS_FOLDER)
        metadata = read_object(self._weights, ORBAX_METADATA)
        where = f"{self._weights / ORBAX_METADATA}"
        for field in ("use_ocdbt", "use_zarr3"):
            if metadata.get(field) is not False:
                raise CheckpointError(
                    f"{where}: {field}: {shown(metadata.get(field))} is not what loong convert writes"
                )
        self._arrays: dict[str, _Array] = {}

    def __enter__(self) -> "OrbaxReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._arrays.clear()

    def where(self, name: str) -> str:
        """The tensor as errors name it: folder and tensor."""
        return f"{self._weights}: {name}"

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a tensor, after its description was compared with what the configuration asks for, and each of its
        chunks was found to be there with its size (to Zarr, a missing chunk is a chunk of zeros)."""
        array = self._arrays[name] = self._describe(name)
        if array.shape != shape:
            raise CheckpointError(f"{self.where(name)}: has shape {shown(list(array.shape))}, not {list(shape)}")
        if array.dtype != dtype:
            raise CheckpointError(f"{self.where(name)}: has dtype {array.dtype}, not {dtype}")
        chunk_bytes = math.prod(array.chunks) * jnp.dtype(dtype).itemsize
        for position in product(*(range(-(-size // chunk)) for size, chunk in zip(shape, array.chunks, strict=True))):
            path = locate(array.folder, _chunk_name(position))
            size = os.lstat(path).st_size
            if size != chunk_bytes:
                raise CheckpointError(f"{path}: is truncated or no chunk of {name}: {size} bytes, not {chunk_bytes}")
        return math.prod(shape) * jnp.dtype(dtype).itemsize

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`tensor[index]`, from the chunks that hold it. Of a chunk, whole rows of its first axis are read."""
        array = self._arrays[name]
        index = (*index, *(slice(None),) * (len(array.shape) - len(index)))
        ranges = [cut.indices(size)[:2] for cut, size in zip(index, array.shape, strict=True)]
        out = np.empty([max(0, stop - first) for first, stop in ranges], jnp.dtype(array.dtype))
        if out.size == 0:
            return out
        grids = [range(first // c, -(-stop // c)) for (first, stop), c in zip(ranges, array.chunks, strict=True)]
        for position in product(*grids):
            # Where this chunk and the slice meet: as the slice counts, and as the chunk counts.
            starts = [p * c for p, c in zip(position, array.chunks, strict=True)]
            meets = [
                (max(first, start), min(stop, start + chunk))
                for (first, stop), start, chunk in zip(ranges, starts, array.chunks, strict=True)
            ]
            of_out = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(meets, ranges, strict=True))
            of_chunk = [(a - start, b - start) for (a, b), start in zip(meets, starts, strict=True)]
            out[of_out] = _read_chunk(array, position, of_chunk)
        return out

    def _describe(self, name: str) -> _Array:
        """The array's metadata. Raises CheckpointError unless it is as loong convert has it written."""
        if not is_there(self._weights, name):
            raise CheckpointError(f"{self._weights}: {name}: tensor is missing")
        folder = _folder(self._weights, name)
        raw = read_object(folder, ZARR_METADATA)
        where = folder / ZARR_METADATA
        for field, expected in _ZARR_FIELDS.items():
            if raw.get(field, None if expected is None else "nothing") != expected:
                raise CheckpointError(f"{where}: {field}: {shown(raw.get(field))} is not what loong convert writes")
        shape, chunks, dtype = raw.get("shape"), raw.get("chunks"), raw.get("dtype")
        if not isinstance(shape, list) or not is_sizes(shape) or not 1 <= len(shape) <= 8:
            raise CheckpointError(f"{where}: shape: {shown(shape)} is no list of sizes")
        if not isinstance(chunks, list) or not is_sizes(chunks) or len(chunks) != len(shape) or 0 in chunks:
            raise CheckpointError(f"{where}: chunks: {shown(chunks)} is no list of sizes for shape {shown(shape)}")
        if math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)) > _MAX_CHUNKS:
            raise CheckpointError(f"{where}: chunks: {shown(chunks)} are more than {_MAX_CHUNKS} for {shown(shape)}")
        for ours, theirs in ZARR_DTYPES.items():
            if dtype == theirs:
                return _Array(folder, tuple(shape), tuple(chunks), ours)
        raise CheckpointError(f"{where}: dtype: {shown(dtype)} is not supported")


def _folder(directory: Path, name: str) -> Path:
    """A folder of the checkpoint, which may not be a link: only files may be shared in a cache."""
    path = directory / name
    if "/" in name or name in ("", ".", "..") or path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: is no folder")
    return path


def _chunk_name(position: tuple[int, ...]) -> str:
    return ".".join(map(str, position))


def _read_chunk(array: _Array, position: tuple[int, ...], cut: list[tuple[int, int]]) -> np.ndarray:
    """`cut` of one chunk."""
    path = locate(array.folder, _chunk_name(position))
    dtype = jnp.dtype(array.dtype)
    first, stop = cut[0]
    rows = np.empty((stop - first, *array.chunks[1:]), dtype)
    with opened(path) as (descriptor, _):
        offset = first * math.prod(array.chunks[1:]) * dtype.itemsize
        read_exactly(path, descriptor, rows.reshape(-1).view(np.uint8).data, offset)
    return rows[(slice(None), *(slice(a, b) for a, b in cut[1:]))]
