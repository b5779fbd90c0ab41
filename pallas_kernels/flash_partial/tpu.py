"""`flash_partial` as a Pallas Mosaic TPU kernel.

The grid is (blocks of heads) x (steps). A step is a pair of a query block and a key block that it may see; the list of
steps is data, prefetched into SMEM, and its length is the bound of the grid. So what no query can see is neither
fetched nor computed, and the pipeline fetches the blocks of the next step during this one. Pairs where nothing is
hidden run without a mask.

Arrays go head first, `[head, tok, dim]`, which on TPU is a choice of layout and no copy. `dim` may be any multiple of
8: memory is padded to lanes anyway. Scores are kept in base 2, since exp2 is what the hardware has.

What it is not: a kernel that knows of rings or pages (`loong_jax/esp`, `paged_partial`).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.chips import LANES, Chip, current_chip
from pallas_kernels.flash_partial.visibility import Extent, extents, may_see, sees_all
from pallas_kernels.partial import NEG, Partial
from pallas_kernels.softmax import varying_zero

TILE_ROWS = 1024
"""Rows of a score tile (heads * query tokens): flops a byte of K and V, above what any TPU needs to stay busy."""
KV_BLOCK = 512
MAX_DIM = 256

# A step, packed: the query block (relative to the first of the call), the key block, and flags.
FIRST, LAST, SOME, ALL = 1, 2, 4, 8  # of its query block; something to compute; nothing hidden
KV_SHIFT, Q_SHIFT = 4, 19
MAX_KV_BLOCKS, MAX_Q_BLOCKS = 1 << (Q_SHIFT - KV_SHIFT), 1 << (31 - Q_SHIFT)

NOBODY = -2
"""Request of padding queries inside the kernel; that of padding keys is -1, so that they never meet."""
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


class Blocks(NamedTuple):
    """Sizes of a step: query heads of one KV head, query tokens, key tokens."""

    heads: int
    q: int
    kv: int


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def vmem_bytes(blocks: Blocks, dim: int, itemsize: int) -> int:
    """An upper estimate of what a step keeps in VMEM: blocks twice, as the pipeline does, state, and score tiles."""
    lanes, rows = _round_up(dim, LANES), blocks.heads * blocks.q
    piped = rows * lanes * (itemsize + 4) + 2 * blocks.kv * lanes * itemsize + 32 * (blocks.q + blocks.kv + rows)
    state = 4 * rows * (lanes + 2 * LANES) + 8 * blocks.q * LANES
    return 2 * piped + state + rows * blocks.kv * (3 * 4 + itemsize) + 4 * rows * lanes


def choose_blocks(
    chip: Chip, tok: int, ctx: int, group: int, dim: int, itemsize: int, block_q: int | None, block_kv: int | None
) -> Blocks:
    """Blocks for `tok` queries of `group` heads each and `ctx` keys. `block_q`, `block_kv`: multiples of 128 that are
    taken as they are. Raises ValueError for others."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size is not None and (size < LANES or size % LANES):
            raise ValueError(f"{name}: must be a positive multiple of {LANES}, not {size}")
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n * LANES <= TILE_ROWS)
    most_q = min(TILE_ROWS // heads, _round_up(tok, LANES))
    blocks = Blocks(heads, block_q or most_q // LANES * LANES, block_kv or min(KV_BLOCK, _round_up(ctx, LANES)))
    while vmem_bytes(blocks, dim, itemsize) > chip.vmem_limit_bytes:
        if block_kv is None and blocks.kv > LANES:
            blocks = blocks._replace(kv=blocks.kv // 2 // LANES * LANES)
        elif block_q is None and blocks.q > LANES:
            blocks = blocks._replace(q=blocks.q // 2 // LANES * LANES)
        else:
            raise NotImplementedError(f"VMEM: {blocks} of dim {dim} take more than {chip.name} has")
    return blocks


def step_list(
    q: Extent, kv: Extent, window: int | Array | None, first: int | Array, num_q: int
) -> tuple[Int[Array, " step"], Int[Array, ""]]:
    """The steps of query blocks `[first, first + num_q)`, as far as there are any, packed, in order, and their number.

    A query block that sees nothing has one step too, without work: its empty partial must be written."""
    index = jnp.arange(num_q, dtype=jnp.int32)
    there = (first + index < q.low_req.shape[0])[:, None]
    q = Extent(*(a.at[first + index].get(mode="fill", fill_value=-1) for a in q))
    seen, whole = may_see(q, kv, window), sees_all(q, kv, window)
    num_kv = seen.shape[1]
    column = jnp.arange(num_kv, dtype=jnp.int32)
    place, count = jnp.cumsum(seen, axis=1), seen.sum(axis=1, keepdims=True)
    nothing = (count == 0) & (column == 0)
    flags = FIRST * (nothing | (place == 1)) + LAST * (nothing | (place == count)) + SOME * seen + ALL * (seen & whole)
    word = (index[:, None] << Q_SHIFT) | (column << KV_SHIFT) | flags
    taken = (seen | nothing) & there
    words = jnp.where(taken, word, jnp.iinfo(jnp.int32).max).reshape(-1)
    return lax.sort(words, is_stable=False), taken.sum(dtype=jnp.int32)  # a stable sort compiles four times as long


def _lanes(x: Shaped[Array, "row lane"], n: int) -> Shaped[Array, "row n"]:
    """`x`, whose lanes are all equal, `n` wide."""
    return jnp.concatenate([x] * -(-n // LANES), axis=1)[:, :n] if n > LANES else x[:, :n]


def _column(row: Int[Array, "1 n"]) -> Int[Array, "n lane"]:
    """A row turned into a column, repeated over the lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _kernel(
    steps,  # SMEM int32 [step]
    scalars,  # SMEM int32 [2]: first query block of the call, window
    q_labels,  # int32 [2, q]: request, position
    kv_labels,  # int32 [2, kv]
    q,  # [heads, q, dim]
    k,  # [1, kv, dim]
    v,  # [1, kv, dim]
    *refs,  # what earlier calls wrote (unread), then outputs and scratch:
    blocks: Blocks,
    scale: float,
    soft_cap: float | None,
    windowed: bool,
):
    out, lse, q_req, q_pos, top, total, acc = refs[-7:]
    # out f32 [heads, q, dim], lse f32 [heads, 1, q]; int32 [q, lane], int32 [q, lane]
    # top, total: f32 [heads * q, lane]; acc: f32 [heads * q, dim]
    step = steps[pl.program_id(1)]
    heads, block_q, dim = q.shape
    rows = heads * block_q
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(step & FIRST != 0)
    def _():
        q_req[...] = _column(q_labels[0:1])
        q_pos[...] = _column(q_labels[1:2])
        top[...] = jnp.full_like(top, NEG)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visible() -> Array:
        """bool [q, kv]"""
        kv_pos, pos = kv_labels[1:2], _lanes(q_pos[...], blocks.kv)
        seen = (_lanes(q_req[...], blocks.kv) == kv_labels[0:1]) & (kv_pos <= pos)
        return seen & (kv_pos > pos - scalars[1]) if windowed else seen

    def fold(masked: bool):
        score = product(q[...].reshape(rows, dim), k[0], (((1,), (1,)), ((), ())))
        if soft_cap is None:
            score = score * (scale * LOG2E)
        else:
            score = jnp.tanh(score * (scale / soft_cap)) * (soft_cap * LOG2E)
        value = v[0]
        if masked:
            score = jnp.where(visible()[None], score.reshape(heads, block_q, blocks.kv), NEG).reshape(rows, blocks.kv)
            present = _column(kv_labels[0:1]) >= 0
            value = jnp.where(_lanes(present, dim), value, jnp.zeros_like(value))  # 0 * NaN is NaN: padding must be 0
        old = top[...]
        new = jnp.maximum(old, score.max(axis=1, keepdims=True))
        # A query that has seen nothing has top == NEG and would weigh hidden keys exp(0): it is shifted by 0 instead.
        shift = jnp.where(new == NEG, 0.0, new) if masked else new
        weight = jnp.exp2(score - _lanes(shift, blocks.kv))
        decay = jnp.exp2(old - new)
        top[...] = new
        total[...] = decay * total[...] + weight.sum(axis=1, keepdims=True)
        added = product(weight.astype(value.dtype), value, (((1,), (0,)), ((), ())))
        acc[...] = acc[...] * _lanes(decay, dim) + added

    pl.when(step & (SOME | ALL) == SOME)(lambda: fold(True))
    pl.when(step & ALL != 0)(lambda: fold(False))

    @pl.when(step & LAST != 0)
    def _():
        seen = total[...] > 0
        sums = jnp.where(seen, total[...], 1.0)
        out[...] = (acc[...] * _lanes(1.0 / sums, dim)).reshape(heads, block_q, dim)
        logs = jnp.where(seen, top[...] * LN2 + jnp.log(sums), NEG)
        for head in range(heads):
            lse[head] = logs[head * block_q : (head + 1) * block_q].T[0:1]


def _labels(req: Int[Array, " tok"], pos: Int[Array, " tok"], size: int, padding: int) -> Int[Array, "2 padded"]:
    """Request and position, filled up to whole blocks with padding."""
    labels = jnp.stack([jnp.where(req >= 0, req, padding), pos]).astype(jnp.int32)
    return jnp.pad(labels, ((0, 0), (0, _round_up(req.shape[0], size) - req.shape[0])), constant_values=padding)


def _heads_first(a: Float[Array, "tok head dim"], size: int) -> Float[Array, "head padded dim"]:
    """Heads in front. An array of less than one block is filled up to it; longer ones end inside their last block."""
    return jnp.pad(a.swapaxes(0, 1), ((0, 0), (0, max(0, size - a.shape[0])), (0, 0)))


def _grid(
    blocks: Blocks, heads: int, kvh: int, dim: int, num_steps: Array, num_written: int
) -> pltpu.PrefetchScalarGridSpec:
    """Which blocks of what a step takes, from the list of steps."""
    shares = heads // blocks.heads // kvh  # rows of the grid that share a KV head

    def q_block(s, steps, scalars):
        return scalars[0] + lax.shift_right_logical(steps[s], Q_SHIFT)

    def kv_block(s, steps, _):
        return lax.shift_right_logical(steps[s], KV_SHIFT) & (MAX_KV_BLOCKS - 1)

    kv_spec = pl.BlockSpec((1, blocks.kv, dim), lambda h, *step: (h // shares, kv_block(*step), 0))
    q_spec = pl.BlockSpec((blocks.heads, blocks.q, dim), lambda h, *step: (h, q_block(*step), 0))
    labels = [
        pl.BlockSpec((2, blocks.q), lambda h, *step: (0, q_block(*step))),
        pl.BlockSpec((2, blocks.kv), lambda h, *step: (0, kv_block(*step))),
    ]
    rows = blocks.heads * blocks.q
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(heads // blocks.heads, num_steps),
        in_specs=[*labels, q_spec, kv_spec, kv_spec, *[pl.BlockSpec(memory_space=pl.ANY)] * num_written],
        out_specs=[q_spec, pl.BlockSpec((blocks.heads, 1, blocks.q), lambda h, *step: (h, 0, q_block(*step)))],
        scratch_shapes=[
            *[pltpu.VMEM((blocks.q, LANES), jnp.int32)] * 2,
            *[pltpu.VMEM((rows, LANES), jnp.float32)] * 2,
            pltpu.VMEM((rows, dim), jnp.float32),
        ],
    )


def _cost(tok: int, heads: int, ctx: int, dim: int, kv_reads: int, itemsize: int) -> pl.CostEstimate:
    """For XLA's scheduler, as if every query saw every key: what is left out is data."""
    return pl.CostEstimate(
        flops=4 * tok * heads * ctx * dim,
        transcendentals=tok * heads * ctx,
        bytes_accessed=tok * heads * dim * (itemsize + 4) + 2 * kv_reads * ctx * dim * itemsize,
    )


def _refuse(q: Array, k: Array, v: Array) -> None:
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"dtypes: float32 or bfloat16 throughout, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[2] > MAX_DIM or q.shape[2] % 8:
        raise NotImplementedError(f"dim: a multiple of 8 up to {MAX_DIM}, not {q.shape[2]}")
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError(f"empty arrays: {q.shape}, {k.shape}")


def flash_partial(
    q: Float[Array, "tok head dim"],
    k: Float[Array, "ctx kvh dim"],
    v: Float[Array, "ctx kvh dim"],
    q_req: Int[Array, " tok"],
    q_pos: Int[Array, " tok"],
    kv_req: Int[Array, " ctx"],
    kv_pos: Int[Array, " ctx"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    chip: Chip | None = None,
    interpret: bool = False,
) -> Partial:
    """See `pallas_kernels.flash_partial`.

    block_q, block_kv: tokens of a block, multiples of 128, instead of the heuristic's. chip: instead of the one the
    program is traced for. interpret: run it in JAX, on any platform. Errors: NotImplementedError for dtypes, dims and
    sizes it does not serve, ValueError for other blocks.
    """
    _refuse(q, k, v)
    (tok, heads, dim), (ctx, kvh, _) = q.shape, k.shape
    chip = chip or current_chip()
    blocks = choose_blocks(chip, tok, ctx, heads // kvh, dim, q.dtype.itemsize, block_q, block_kv)
    num_q, num_kv = -(-tok // blocks.q), -(-ctx // blocks.kv)
    # Query blocks of one call: as many as SMEM can list the steps of.
    call_q = min(num_q, chip.smem_limit_bytes // (4 * num_kv), MAX_Q_BLOCKS)
    if num_kv > MAX_KV_BLOCKS or call_q == 0:
        raise NotImplementedError(f"ctx: {ctx} tokens are more than SMEM can list in blocks of {blocks.kv}")

    q_labels, kv_labels = _labels(q_req, q_pos, blocks.q, NOBODY), _labels(kv_req, kv_pos, blocks.kv, -1)
    q_extents = extents(*q_labels.reshape(2, num_q, blocks.q))
    kv_extents = extents(*kv_labels.reshape(2, num_kv, blocks.kv))
    inputs = (q_labels, kv_labels, _heads_first(q, blocks.q), _heads_first(k, blocks.kv), _heads_first(v, blocks.kv))
    # What several calls write into must be whole blocks: JAX's interpreter pads an output, but not what it aliases.
    out_tok = inputs[2].shape[1] if call_q == num_q else num_q * blocks.q
    varying = jax.typeof(varying_zero(q, k, v, q_req, q_pos, kv_req, kv_pos)).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in ((heads, out_tok, dim), (heads, 1, num_q * blocks.q))
    ]
    kernel = partial(_kernel, blocks=blocks, scale=scale, soft_cap=soft_cap, windowed=window is not None)
    options = {
        "out_shape": shapes,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # the estimate is about twice what the compiler takes
            vmem_limit_bytes=min(chip.vmem_limit_bytes, vmem_bytes(blocks, dim, q.dtype.itemsize) * 3 // 2),
        ),
        "cost_estimate": _cost(call_q * blocks.q, heads, ctx, dim, heads // blocks.heads * call_q, q.dtype.itemsize),
        "interpret": interpret,
        "name": "flash_partial",
    }

    def call(first: int | Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        """The steps of `call_q` query blocks from `first` on; `written` holds the outputs of all blocks before."""
        steps, num_steps = step_list(q_extents, kv_extents, window, first, call_q)
        scalars = jnp.stack([jnp.int32(first), jnp.int32(0 if window is None else window)])
        grid = _grid(blocks, heads, kvh, dim, num_steps, len(written))
        aliases = {2 + len(inputs) + i: i for i in range(len(written))}
        run = pl.pallas_call(kernel, grid_spec=grid, input_output_aliases=aliases, **options)
        return tuple(run(steps, scalars, *inputs, *written))

    if call_q == num_q:
        out, lse = call(0, ())
    else:
        body = lambda i, written: call(i * call_q, written)
        blank = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
        out, lse = lax.fori_loop(0, -(-num_q // call_q), body, blank)
    return Partial(out[:, :tok].swapaxes(0, 1), lse[:, 0, :tok].T)
