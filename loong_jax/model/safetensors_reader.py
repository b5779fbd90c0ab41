"""The tensors of a Hugging Face folder: safetensors, one file or sharded with an index.

What it is: one of the readers behind `leaves.Tensors`. Headers are checked as strictly as the format is written down:
the tensors tile the file without holes or overlaps. Slices are read into memory of their own, not mapped, so that a
file that shrinks or a disk that fails is an error and not a signal, and no mapped pages pile up.
What it is not: which slices are needed (`leaves.py`), or where they go (`checkpoint.py`).
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np

from loong_jax.model.untrusted import (
    CheckpointError,
    is_sizes,
    is_there,
    locate,
    opened,
    parse_object,
    read_exactly,
    read_object,
    shown,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 25_000_000  # as the Hugging Face Hub allows
MAX_NAME_CHARS = 512
_MIN_CUT_BYTES = 4096  # a page: less of a row cannot be read alone
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a file; `start`: of its bytes, counted from the file's first."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class _File(msgspec.Struct, frozen=True):
    path: Path
    descriptor: int
    entries: dict[str, _Entry]


class SafetensorsReader:
    """The tensors of a checkpoint folder. A context manager; all headers are checked when it is made."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._file_of: dict[str, _File] = {}
        try:
            self._locate()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def where(self, name: str) -> str:
        """The tensor as errors name it: file and tensor."""
        return f"{self._file_of[name].path}: {name}"

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a tensor, after its header was compared with what the configuration asks for."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: {name}: tensor is missing")
        entry = self._file_of[name].entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{self.where(name)}: has shape {shown(list(entry.shape))}, not {list(shape)}")
        if entry.dtype != SAFETENSORS_DTYPES[dtype]:
            raise CheckpointError(f"{self.where(name)}: has dtype {entry.dtype}, not {SAFETENSORS_DTYPES[dtype]}")
        return math.prod(shape) * _SIZES[entry.dtype]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`tensor[index]`. Whole rows of the first axis are read, unless a slice of the second leaves out pages."""
        file = self._file_of[name]
        entry = file.entries[name]
        dtype = next(jnp.dtype(ours) for ours, theirs in SAFETENSORS_DTYPES.items() if theirs == entry.dtype)
        first, stop, _ = index[0].indices(entry.shape[0])
        row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
        offset = entry.start + first * row_bytes
        if len(index) == len(entry.shape) == 2:
            left, right, _ = index[1].indices(entry.shape[1])
            cut_bytes = (right - left) * dtype.itemsize
            if _MIN_CUT_BYTES <= cut_bytes <= row_bytes - _MIN_CUT_BYTES:
                out = np.empty((max(0, stop - first), right - left), dtype)
                rows, offset = out.view(np.uint8), offset + left * dtype.itemsize
                for row in range(out.shape[0]):
                    read_exactly(file.path, file.descriptor, rows[row].data, offset + row * row_bytes)
                return out
        out = np.empty((max(0, stop - first), *entry.shape[1:]), dtype)
        read_exactly(file.path, file.descriptor, out.reshape(-1).view(np.uint8).data, offset)
        return out[(slice(None), *index[1:])]

    def _locate(self) -> None:
        """Find and check every file, and know which tensor is where."""
        directory = self._directory
        if is_there(directory, INDEX_FILE):
            weight_map = read_object(directory, INDEX_FILE).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{directory / INDEX_FILE}: weight_map: is no object")
            for name, file in weight_map.items():
                if not isinstance(file, str) or not file.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{directory / INDEX_FILE}: weight_map.{name[:200]}: {shown(file)} is no safetensors file"
                    )
            files = {name: self._open(name) for name in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                if name not in files[file].entries:
                    raise CheckpointError(f"{files[file].path}: {name[:200]}: tensor is missing")
        elif is_there(directory, SINGLE_FILE):
            self._open(SINGLE_FILE)
        elif any(directory.glob("*.bin")):
            raise CheckpointError(f"{directory}: holds only .bin weights; convert them to safetensors")
        else:
            raise CheckpointError(f"{directory / SINGLE_FILE}: file is missing")

    def _open(self, name: str) -> _File:
        path = locate(self._directory, name)
        descriptor, size = self._stack.enter_context(opened(path))
        file = _File(self._directory / name, descriptor, _read_header(self._directory / name, descriptor, size))
        for tensor in file.entries:
            if tensor in self._file_of:
                raise CheckpointError(f"{file.path}: {tensor}: is also in {self._file_of[tensor].path}")
            self._file_of[tensor] = file
        return file


def _read_header(path: Path, descriptor: int, file_bytes: int) -> dict[str, _Entry]:
    """The tensors of a file, checked to tile it."""
    prefix = bytearray(8)
    if file_bytes < 8:
        raise CheckpointError(f"{path}: is truncated or no safetensors file: {file_bytes} bytes")
    read_exactly(path, descriptor, memoryview(prefix), 0)
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header: {header_bytes} bytes are more than the limit of {MAX_HEADER_BYTES}")
    if 8 + header_bytes > file_bytes:
        raise CheckpointError(f"{path}: is truncated or no safetensors file: its header ends after the file")
    content = bytearray(header_bytes)
    read_exactly(path, descriptor, memoryview(content), 8)
    header = parse_object(bytes(content), f"{path}: header")
    header.pop("__metadata__", None)
    if long := [name for name in header if len(name) > MAX_NAME_CHARS]:
        raise CheckpointError(f"{path}: header: {shown(long[0])}: is too long a name")
    data_start = 8 + header_bytes
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            problem = "overlaps the tensor before it" if start < end else f"leaves a hole of {start - end} bytes"
            raise CheckpointError(f"{path}: {name}: data_offsets: {problem}")
        end = stop
    if data_start + end != file_bytes:
        problem = "is truncated" if data_start + end > file_bytes else "holds more than its tensors"
        raise CheckpointError(f"{path}: {problem}: {file_bytes} bytes, the header says {data_start + end}")
    return {
        name: _Entry(header[name]["dtype"], tuple(header[name]["shape"]), data_start + start)
        for start, _, name in spans
    }


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Start and stop of a tensor's bytes, after its description was found to be consistent."""
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise CheckpointError(f"{where}: dtype: {shown(dtype)} is not known")
    if not is_sizes(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape: {shown(shape)} is no list of sizes")
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets: {shown(offsets)} is no range")
    if math.prod(shape) * _SIZES[dtype] != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: data_offsets: {offsets[1] - offsets[0]} bytes do not hold {dtype} of shape {shown(shape)}"
        )
    return offsets[0], offsets[1]
