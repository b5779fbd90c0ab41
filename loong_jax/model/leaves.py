"""Which slices of which checkpoint tensors make each parameter of one tensor-parallel rank (DESIGN 5).

What it is: a plan, the same for every kind of checkpoint, since all keep their tensors as Hugging Face names and shapes
them; and the assembling of one leaf from the slices a reader gives.
What it is not: a reader of files (`safetensors_reader.py`), or the placing on devices (`checkpoint.py`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, Protocol

import msgspec
import numpy as np

from loong_jax.config import ModelConfig
from loong_jax.local_sizes import local_sizes
from loong_jax.model.families import family_of
from loong_jax.model.untrusted import CheckpointError

_BLOCK_ELEMENTS = 1 << 19
"""Read at once: few enough to stay in a cache from the read over the check to the transposed write."""
_LINE_BYTES = 64


Each = Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]
"""each(function, arguments): calls, some at once perhaps; what one of them raises comes out of the iteration."""


class Tensors(Protocol):
    """The tensors of a checkpoint, whatever its format: named, with Hugging Face names and shapes. `check` and `read`
    raise CheckpointError naming file and tensor; threads may `read` at once."""

    def where(self, name: str) -> str:
        """The tensor as errors name it: file and tensor."""
        ...

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a tensor, after its description was compared with what the configuration asks for."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor that was checked; `index` has a slice of step 1 for some of the first axes."""
        ...


class Piece(msgspec.Struct, frozen=True):
    """`[start, stop)` along `axis` of the checkpoint tensor `name`, whose whole shape must be `shape`."""

    name: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int

    def blocks(self) -> Iterator[tuple[int, tuple[slice, ...]]]:
        """The slice in blocks of rows: (first row within the slice, index into the tensor)."""
        first, stop = (self.start, self.stop) if self.axis == 0 else (0, self.shape[0])
        step = max(1, _BLOCK_ELEMENTS // math.prod(self.shape[1:]) // _LINE_BYTES) * _LINE_BYTES
        for row in range(first, stop, step):
            rows = slice(row, min(row + step, stop))
            yield row - first, (rows,) if self.axis == 0 else (rows, slice(self.start, self.stop))

    def read(self, tensors: Tensors, index: tuple[slice, ...]) -> np.ndarray:
        """One block. Raises CheckpointError for NaN and infinite values."""
        block = tensors.read(self.name, index)
        if not all_finite(block):
            raise CheckpointError(f"{tensors.where(self.name)}: holds NaN or infinite values")
        return block

    @property
    def num_rows(self) -> int:
        return self.stop - self.start if self.axis == 0 else self.shape[0]


def all_finite(block: np.ndarray) -> bool:
    """Whether no float32 or bfloat16 value is NaN or infinite: those have every bit of the exponent set."""
    bits, exponent = (np.uint32, 0x7F800000) if block.dtype == np.float32 else (np.uint16, 0x7F80)
    return block.size == 0 or int((block.view(bits) & bits(exponent)).max()) < exponent


class Leaf(msgspec.Struct, frozen=True):
    """One leaf of the parameters: pieces side by side. `transpose`: the checkpoint keeps linear maps as [out, in]."""

    path: tuple[str | int, ...]  # ("embed",) or ("layers", layer, "qkv")
    pieces: tuple[Piece, ...]
    transpose: bool

    def read(self, tensors: Tensors, shape: tuple[int, ...], dtype: np.dtype, each: Each = map) -> np.ndarray:
        """The leaf as a host array; what the pieces do not fill (a padded vocabulary) is zero. `each`: `map`, or that
        of an executor whose threads share the blocks."""
        out = _aligned_zeros(shape, dtype)
        ends = accumulate(piece.num_rows for piece in self.pieces)
        jobs = [
            (end - piece.num_rows + row, piece, index)
            for end, piece in zip(ends, self.pieces, strict=True)
            for row, index in piece.blocks()
        ]

        def fill(job: tuple[int, Piece, tuple[slice, ...]]) -> None:
            first, piece, index = job
            block = piece.read(tensors, index)
            rows = slice(first, first + block.shape[0])
            if self.transpose:
                _write_transposed(out[:, rows], block)
            else:
                out[rows] = block

        for _ in each(fill, jobs):
            pass
        return out


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Where a cache line begins. There, JAX on CPU takes the memory as it is: no copy, and one for all instances."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + _LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % _LINE_BYTES
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _write_transposed(out: np.ndarray, block: np.ndarray) -> None:
    """`out[:] = block.T`, a cache line of each row of `out` at a time: 4 to 7 times as fast."""
    step = _LINE_BYTES // block.dtype.itemsize
    for row in range(0, block.shape[0], step):
        out[:, row : row + step] = block[row : row + step].T


def leaves_of(config: ModelConfig, tp: int, rank: int) -> Iterator[Leaf]:
    """All leaves of one rank."""
    family, local = family_of(config), local_sizes(config, tp)

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
    family, local = family_of(config), local_sizes(config, tp)
    d, dim, ff = config.hidden_size, config.head_dim, config.intermediate_size
    first_kv = rank * config.num_kv_heads // tp

    def heads(name: str, num_heads: int, first: int, count: int) -> Piece:
        shape = (num_heads * dim,) if name.endswith("bias") else (num_heads * dim, d)
        return Piece(name.format(layer=layer), shape, 0, first * dim, (first + count) * dim)

    def qkv(q: str, k: str, v: str) -> tuple[Piece, ...]:
        return (
            heads(q, config.num_heads, rank * local.num_heads, local.num_heads),
            heads(k, config.num_kv_heads, first_kv, local.num_kv_heads),
            heads(v, config.num_kv_heads, first_kv, local.num_kv_heads),
        )

    def columns(name: str) -> Piece:
        first = rank * local.intermediate_size
        return Piece(name.format(layer=layer), (ff, d), 0, first, first + local.intermediate_size)

    def rows(name: str, size: int) -> Piece:
        return Piece(name.format(layer=layer), (d, size), 1, rank * size // tp, (rank + 1) * size // tp)

    def leaf(key: str, *pieces: Piece, transpose: bool = True) -> Leaf:
        return Leaf(("layers", layer, key), pieces, transpose)

    def whole(key: str, name: str, size: int) -> Leaf:
        return Leaf(("layers", layer, key), (_whole(name.format(layer=layer), size),), False)

    yield whole("attn_norm", family.attn_norm, d)
    yield leaf("qkv", *qkv(family.q, family.k, family.v))
    if config.qkv_bias:
        yield leaf("qkv_bias", *qkv(family.q_bias, family.k_bias, family.v_bias), transpose=False)
    if family.qk_norm:
        yield whole("q_norm", family.q_norm, dim)
        yield whole("k_norm", family.k_norm, dim)
    yield leaf("o", rows(family.o, config.num_heads * dim))
    if config.o_bias:
        yield whole("o_bias", family.o_bias, d)
    yield whole("ffn_norm", family.ffn_norm, d)
    yield leaf("gate_up", columns(family.gate), columns(family.up))
    yield leaf("down", rows(family.down, ff))
    if family.post_norms:
        yield whole("attn_post_norm", family.attn_post_norm, d)
        yield whole("ffn_post_norm", family.ffn_post_norm, d)


def _whole(name: str, size: int) -> Piece:
    return Piece(name, (size,), 0, 0, size)
