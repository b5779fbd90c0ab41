"""Safetensors -> the shards of every instance (DESIGN 5).

What it is: a plan of which slices of which tensors make each leaf of one tensor-parallel rank, a check of all headers
before anything is placed, and the placing: slice by slice through the memory map, so that host memory holds about one
fused leaf at a time, and each byte is read once however many instances get it.
What it is not: the configuration (`hf_config.py`) or the model (`llama.py`).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from loong_jax.config import ModelConfig
from loong_jax.model.families import FAMILIES, Family
from loong_jax.model.hf_config import CheckpointError
from loong_jax.model.llama import Params, local_sizes, param_structs

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}

# jaxlib has no stubs: to a type checker jax.Device is a variable.
Device = Any

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""


class Piece(msgspec.Struct, frozen=True):
    """`[start, stop)` along `axis` of the checkpoint tensor `name`, whose whole shape must be `shape`."""

    name: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int

    def read(self, tensors: "Tensors") -> np.ndarray:
        rows = slice(self.start, self.stop)
        return tensors.read(self.name, (slice(None),) * self.axis + (rows,))


class Leaf(msgspec.Struct, frozen=True):
    """One leaf of the parameters: pieces side by side. `transpose`: the checkpoint keeps linear maps as [out, in]."""

    path: tuple[str | int, ...]  # ("embed",) or ("layers", layer, "qkv")
    pieces: tuple[Piece, ...]
    transpose: bool

    def read(self, tensors: "Tensors", shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The leaf as a host array; what the pieces do not fill (a padded vocabulary) is zero."""
        out = np.zeros(shape, dtype)
        filled = 0
        for piece in self.pieces:
            block = piece.read(tensors)
            if self.transpose:
                out[:, filled : filled + block.shape[0]] = block.T
                filled += block.shape[0]
            else:
                out[: block.shape[0]] = block
        return out


def leaves_of(config: ModelConfig, tp: int, rank: int) -> Iterator[Leaf]:
    """All leaves of one rank."""
    family, local = _family(config), local_sizes(config, tp)

    def vocabulary(name: str) -> tuple[Piece, ...]:
        start = min(rank * local.vocab_size, config.vocab_size)
        stop = min(start + local.vocab_size, config.vocab_size)
        return (Piece(name, (config.vocab_size, config.hidden_size), 0, start, stop),)

    yield Leaf(("embed",), vocabulary(family.embed), False)
    for layer in range(config.num_layers):
        yield from _layer_leaves(config, tp, rank, layer)
    yield Leaf(("final_norm",), (_whole(family.final_norm, config.hidden_size),), False)
    if not config.tie_embeddings:
        yield Leaf(("lm_head",), vocabulary(family.lm_head), False)


def _layer_leaves(config: ModelConfig, tp: int, rank: int, layer: int) -> Iterator[Leaf]:
    """The leaves of one layer. Where tp exceeds num_kv_heads, neighbouring ranks hold the same KV head."""
    family, local = _family(config), local_sizes(config, tp)
    d, dim, ff = config.hidden_size, config.head_dim, config.intermediate_size
    first_kv = rank * config.num_kv_heads // tp

    def heads(name: str, num_heads: int, first: int, count: int) -> Piece:
        return Piece(name.format(layer=layer), (num_heads * dim, d), 0, first * dim, (first + count) * dim)

    def columns(name: str) -> Piece:
        first = rank * local.intermediate_size
        return Piece(name.format(layer=layer), (ff, d), 0, first, first + local.intermediate_size)

    def rows(name: str, size: int) -> Piece:
        return Piece(name.format(layer=layer), (d, size), 1, rank * size // tp, (rank + 1) * size // tp)

    def leaf(key: str, *pieces: Piece, transpose: bool = True) -> Leaf:
        return Leaf(("layers", layer, key), pieces, transpose)

    yield leaf("attn_norm", _whole(family.attn_norm.format(layer=layer), d), transpose=False)
    yield leaf(
        "qkv",
        heads(family.q, config.num_heads, rank * local.num_heads, local.num_heads),
        heads(family.k, config.num_kv_heads, first_kv, local.num_kv_heads),
        heads(family.v, config.num_kv_heads, first_kv, local.num_kv_heads),
    )
    yield leaf("o", rows(family.o, config.num_heads * dim))
    yield leaf("ffn_norm", _whole(family.ffn_norm.format(layer=layer), d), transpose=False)
    yield leaf("gate_up", columns(family.gate), columns(family.up))
    yield leaf("down", rows(family.down, ff))


def _whole(name: str, size: int) -> Piece:
    return Piece(name, (size,), 0, 0, size)


def _family(config: ModelConfig) -> Family:
    return next(family for family in FAMILIES if family.name == config.family)


class Tensors:
    """The tensors of a checkpoint directory, memory-mapped. A context manager."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = self._locate()

    def __enter__(self) -> "Tensors":
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


def load_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    *,
    tp: int,
    devices: Sequence[Sequence[Device | None]],
    stacked: bool,
    progress: Progress | None = None,
) -> list[list[Params | None]]:
    """The parameters of every instance: `result[instance][rank]` is the tree of arrays `[1, *local]` (under "layers"
    `[1, layers, *local]` if `stacked`) committed to `devices[instance][rank]`, or None where that is None.

    Raises CheckpointError naming file and tensor, before anything is placed; ConfigError if tp cannot divide the model.
    """
    structs = param_structs(config, tp, stacked=False)
    ranks = [rank for rank in range(tp) if any(row[rank] is not None for row in devices)]
    out = [[_empty(config, device) for device in row] for row in devices]
    with Tensors(directory) as tensors:
        sizes = {
            p.name: tensors.check(p.name, p.shape, config.dtype)
            for leaf in leaves_of(config, tp, 0)
            for p in leaf.pieces
        }
        total, done = sum(sizes.values()), 0
        for leaves in zip(*(leaves_of(config, tp, rank) for rank in ranks), strict=True):
            for rank, leaf in zip(ranks, leaves, strict=True):
                struct = _at(structs, leaf.path)
                host = leaf.read(tensors, struct.shape[1:], struct.dtype)
                targets = [
                    (device, tree)
                    for row, trees in zip(devices, out, strict=True)
                    if (device := row[rank]) is not None and (tree := trees[rank]) is not None
                ]
                _place(host, leaf.path, targets, config.num_layers if stacked else None)
            done += sum(sizes[piece.name] for piece in leaves[0].pieces)
            if progress is not None:
                progress(done, total)
    return out


def _empty(config: ModelConfig, device: Device | None) -> Params | None:
    return None if device is None else {"layers": [{} for _ in range(config.num_layers)]}


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _place(host: np.ndarray, path: tuple, targets: list[tuple[Device, Params]], stack: int | None) -> None:
    """Put one leaf of one rank on its devices, and wait, so that host copies do not pile up."""
    placed = []
    for device, tree in targets:
        value = jax.device_put(host[None], device)
        if len(path) == 3 and stack is not None:
            value = _into_stack(tree, path[2], path[1], value, stack)
        else:
            _at(tree, path[:-1])[path[-1]] = value
        placed.append(value)
    jax.block_until_ready(placed)


def _into_stack(tree: Params, name: str, layer: int, value: jax.Array, num_layers: int) -> jax.Array:
    """Write a layer's leaf into the stacked leaf on its device (a stack in host memory would be many tensors)."""
    if not isinstance(tree["layers"], dict):
        tree["layers"] = {}
    if name not in tree["layers"]:
        shape = (1, num_layers, *value.shape[1:])
        tree["layers"][name] = jax.jit(lambda: jnp.zeros(shape, value.dtype), out_shardings=value.sharding)()
    tree["layers"][name] = _set_layer(tree["layers"][name], value, layer)
    return tree["layers"][name]


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, value[:, None], layer, axis=1)
