"""A checkpoint -> the shards of every instance (DESIGN 5).

What it is: a check of all tensors before anything is placed, and the placing: leaf by leaf, so that host memory holds
one or two fused leaves at a time, and each byte is read once however many instances get it.
What it is not: the plan of slices (`leaves.py`), a file format (`safetensors_reader.py`, `orbax_reader.py`), the
configuration (`hf_config.py`) or the model (`decoder.py`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import Params, param_structs
from loong_jax.model.leaves import leaves_of
from loong_jax.model.orbax_reader import OrbaxReader, is_orbax
from loong_jax.model.safetensors_reader import SafetensorsReader

# jaxlib has no stubs: to a type checker jax.Device is a variable.
Device = Any

_NUM_THREADS = 4
"""That read and transpose blocks of a leaf at once: reading waits for the disk, and most of the rest for memory."""

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""


def open_tensors(directory: str | Path) -> SafetensorsReader | OrbaxReader:
    """The reader for the kind of checkpoint in `directory`. A context manager. Raises CheckpointError."""
    return OrbaxReader(directory) if is_orbax(directory) else SafetensorsReader(directory)


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
    ranks = [rank for rank in range(tp) if any(row[rank] is not None for row in devices)]
    with open_tensors(directory) as tensors, ThreadPoolExecutor(_NUM_THREADS, "loong-read") as threads:
        sizes = {
            p.name: tensors.check(p.name, p.shape, config.dtype)
            for leaf in leaves_of(config, tp, 0)
            for p in leaf.pieces
        }
        structs = param_structs(config, tp, stacked=False)
        out = [[_empty(config, device) for device in row] for row in devices]
        total, done = sum(sizes.values()), 0
        for leaves in zip(*(leaves_of(config, tp, rank) for rank in ranks), strict=True):
            for rank, leaf in zip(ranks, leaves, strict=True):
                struct = _at(structs, leaf.path)
                host = leaf.read(tensors, struct.shape[1:], struct.dtype, threads.map)
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
