"""The tensors of a Hugging Face folder: safetensors, one file or sharded with an index.

What it is: one of the readers behind `leaves.Tensors`.
What it is not: which slices are needed (`leaves.py`), or where they go (`checkpoint.py`).
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from loong_jax.model.hf_config import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


class SafetensorsReader:
    """The tensors of a checkpoint directory, memory-mapped. A context manager."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = self._locate()

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.clear()
        self._stack.close()

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a tensor, after its header was compared with what the configuration asks for."""
        path, view = self._slice(name)
        if tuple(view.get_shape()) != shape:
            raise CheckpointError(f"{path}: {name}: has shape {list(view.get_shape())}, not {list(shape)}")
        if view.get_dtype() != SAFETENSORS_DTYPES[dtype]:
            raise CheckpointError(f"{path}: {name}: has dtype {view.get_dtype()}, not {SAFETENSORS_DTYPES[dtype]}")
        return int(np.prod(shape)) * jnp.dtype(dtype).itemsize

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice(name)[1][index]

    def _slice(self, name: str) -> tuple[Path, Any]:
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: {name}: tensor is missing")
        path = self._directory / self._file_of[name]
        try:
            return path, self._open(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name}: tensor is missing: {error}") from error

    def _open(self, path: Path) -> Any:
        if path.name not in self._files:
            try:
                self._files[path.name] = self._stack.enter_context(safe_open(path, framework="numpy"))
            except FileNotFoundError as error:
                raise CheckpointError(f"{path}: file is missing") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: is truncated or no safetensors file: {error}") from error
        return self._files[path.name]

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self._directory / INDEX_FILE
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index}: weight_map: cannot be read: {error}") from error
        single = self._directory / SINGLE_FILE
        if single.exists():
            return dict.fromkeys(self._open(single).keys(), SINGLE_FILE)
        if any(self._directory.glob("*.bin")):
            raise CheckpointError(f"{self._directory}: holds only .bin weights; convert them to safetensors")
        raise CheckpointError(f"{single}: file is missing")
