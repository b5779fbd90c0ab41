"""A Hugging Face folder -> a folder with an Orbax checkpoint, to be served or loaded by Orbax itself.

What it is: the same tensors under the same names, each in chunks along the axis that tensor parallelism slices, so that
any number of instances of any tp reads only its shards (`orbax_reader.py`); the configuration and the tokenizer are
copied. One tensor at a time is in memory. The folder appears whole or not at all.
What it is not: part of serving: importing it imports Orbax.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from loong_jax.config import ConfigError, ModelConfig
from loong_jax.model.hf_config import read_config
from loong_jax.model.leaves import Piece, leaves_of
from loong_jax.model.orbax_reader import WEIGHTS_FOLDER, ZARR_DTYPES, is_orbax
from loong_jax.model.safetensors_reader import SafetensorsReader
from loong_jax.model.untrusted import is_there, read_bytes

CONFIG_FILE = "config.json"
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
MAX_COPIED_BYTES = 256 * 1024 * 1024
_MIN_CHUNK_BYTES = 1 << 20
_MAX_CHUNKS = 16

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""


class LazyTensor(msgspec.Struct, frozen=True):
    """A leaf of the tree that Orbax saves: read when its turn comes. `axis`: the one that is cut into chunks."""

    piece: Piece
    dtype: str
    tensors: SafetensorsReader

    def read(self) -> np.ndarray:
        out = np.empty(self.piece.shape, jnp.dtype(self.dtype))
        for row, index in self.piece.blocks():
            block = self.piece.read(self.tensors, index)
            out[row : row + block.shape[0]] = block
        return out

    @property
    def num_bytes(self) -> int:
        return math.prod(self.piece.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """Up to 16 along the sliced axis, so that a tp up to 16 that divides the axis cuts between chunks."""
        count = min(_MAX_CHUNKS, max(1, self.num_bytes // _MIN_CHUNK_BYTES))
        chunks = list(self.piece.shape)
        chunks[self.piece.axis] = -(-chunks[self.piece.axis] // count)
        return tuple(chunks)


class LazyTensorHandler(type_handlers.NumpyHandler):
    """Has Orbax save LazyTensors as it saves numpy arrays, but one at a time, uncompressed, in chunks of our choice."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__()
        self._progress = progress

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        total, done = sum(value.num_bytes for value in values), 0
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{info.parent_dir / info.name}/"},
                "metadata": {
                    "shape": value.piece.shape,
                    "chunks": value.chunks,
                    "dtype": ZARR_DTYPES[value.dtype],
                    "compressor": None,
                },
                "store_data_equal_to_fill_value": True,
            }
            array = await tensorstore.open(tensorstore.Spec(spec), create=True)
            await array.write(value.read(), can_reference_source_data_indefinitely=True)
            done += value.num_bytes
            if self._progress is not None:
                self._progress(done, total)
        return []


def convert(source: str | Path, out: str | Path, *, progress: Progress | None = None) -> None:
    """Convert the checkpoint in `source` to `out`, which must not exist or be empty.

    Raises CheckpointError for the source, ConfigError for `out`."""
    source, out = Path(source), Path(out)
    if is_orbax(source):
        raise ConfigError(f"source: {source} is converted already")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"out: {out} is there already, and not empty")
    config = read_config(source)
    with SafetensorsReader(source) as tensors:
        pieces = _whole_tensors(config)
        for piece in pieces:
            tensors.check(piece.name, piece.shape, config.dtype)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed in the end. config.json comes last: without it, nothing is served.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.converting-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _save(made / WEIGHTS_FOLDER, [LazyTensor(piece, config.dtype, tensors) for piece in pieces], progress)
            for name in COPIED:
                if is_there(source, name):
                    (made / name).write_bytes(read_bytes(source, name, MAX_COPIED_BYTES))
            (made / CONFIG_FILE).write_bytes(read_bytes(source, CONFIG_FILE, MAX_COPIED_BYTES))
            try:
                os.rename(made, out)
            except OSError as error:
                raise ConfigError(f"out: {out} cannot be put in place: {error.strerror}") from error


def _whole_tensors(config: ModelConfig) -> list[Piece]:
    """Every tensor of the model, whole, with the axis that tensor parallelism slices."""
    pieces = {piece.name: piece for leaf in leaves_of(config, 1, 0) for piece in leaf.pieces}
    return [msgspec.structs.replace(p, start=0, stop=p.shape[p.axis]) for p in pieces.values()]


def _save(folder: Path, tensors: Sequence[LazyTensor], progress: Progress | None) -> None:
    registry = type_handlers.create_type_handler_registry((LazyTensor, LazyTensorHandler(progress)))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave({value.piece.name: value for value in tensors}))
