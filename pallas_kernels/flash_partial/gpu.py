"""`flash_partial` as a Pallas Mosaic GPU kernel for Hopper: one warpgroup fetches (TMA), two compute (wgmma).

A block of the grid is a query head and two tiles of 64 query tokens, one for each computing warpgroup. From the
positions follows, as data, which key blocks it may see; only those are fetched and computed, those where nothing is
hidden first and without a mask. Query blocks with the most to do start first.

Two forms. In the default one the weights pass through shared memory and each product has an accumulator of its own:
JAX's interpreter runs that, so it has been executed. `weights_in_registers=True` is the faster form by the hardware's
rules; it is compiled, and has never run. What it is not: a kernel for float32 or for other GPUs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_partial.visibility import Extent, block_lists, extents, may_see, sees_all
from pallas_kernels.hopper import (
    LN2,
    LOG2E,
    NO_WINDOW,
    ROWS,
    SMEM_LIMIT_BYTES,
    SWIZZLE_DIM,
    Ref,
    acc_columns,
    columns_to_tile,
    empty_acc,
    load,
    require_bfloat16,
    require_dim,
    require_hopper,
    require_jax,
    rows_to_tile,
    tile,
)
from pallas_kernels.partial import NEG, Partial

COMPUTING = 2
"""Warpgroups that compute; one more fetches."""
BLOCK_Q = COMPUTING * ROWS
MAX_KV = 128
MAX_STAGES = 3
NOBODY = -2
"""Request of padding queries inside the kernel; that of padding keys is -1, so that they never meet."""


class Sizes(NamedTuple):
    """Keys of a block, and how many blocks of K and V are in shared memory at once."""

    kv: int
    stages: int


class Work(NamedTuple):
    """What each query block has to do, as data. `order`: the blocks, those with most to do first."""

    order: Int[Array, " qblock"]
    lists: Int[Array, "qblock kvblock"]  # first those seen whole
    whole: Int[Array, " qblock"]
    count: Int[Array, " qblock"]  # whole and others


def smem_bytes(sizes: Sizes, dim: int) -> int:
    """Queries, weights, and the stages of K and V; barriers and what the compiler keeps are within the last KiB."""
    return 2 * (BLOCK_Q * dim + BLOCK_Q * sizes.kv + 2 * sizes.stages * sizes.kv * dim) + 1024


def choose_sizes(dim: int, block_kv: int | None, stages: int | None) -> Sizes:
    """The largest block, with as many stages as fit. Raises ValueError for sizes that no kernel has."""
    if block_kv is not None and block_kv not in (64, 128, 192, 256):
        raise ValueError(f"block_kv: must be 64, 128, 192 or 256, not {block_kv}")
    if stages is not None and stages < 2:
        raise ValueError(f"stages: must be 2 or more, not {stages}")
    for kv in (block_kv,) if block_kv else (MAX_KV, 64):
        for n in (stages,) if stages else range(MAX_STAGES, 1, -1):
            if smem_bytes(Sizes(kv, n), dim) <= SMEM_LIMIT_BYTES:
                return Sizes(kv, n)
    raise NotImplementedError(f"shared memory: {block_kv} keys of dim {dim} in {stages} stages are more than there is")


def find_work(q: Extent, kv: Extent, window: int | Array | None) -> Work:
    """Which key blocks each query block visits."""
    seen = may_see(q, kv, window)
    whole = seen & sees_all(q, kv, window)
    num_whole, count = whole.sum(axis=1, dtype=jnp.int32), seen.sum(axis=1, dtype=jnp.int32)
    lists = block_lists(whole)[0]
    others, num_others = block_lists(seen & ~whole)
    step = jnp.arange(seen.shape[1])
    shifted = jnp.take_along_axis(others, jnp.clip(step - num_whole[:, None], 0), axis=1)
    lists = jnp.where(step < num_whole[:, None], lists, jnp.where(num_others[:, None] > 0, shifted, 0))
    return Work(jnp.argsort(-count).astype(jnp.int32), lists.astype(jnp.int32), num_whole, count)


class Refs(NamedTuple):
    """Inputs and outputs in GMEM, then shared memory and its barriers."""

    order: Ref  # [qblock]
    lists: Ref  # [qblock, kvblock]
    whole: Ref  # [qblock]
    count: Ref  # [qblock]
    window: Ref  # [1]
    q_labels: Ref  # [2, tok]: request, position
    kv_labels: Ref  # [2, ctx]
    q: Ref  # [tok, head, dim]
    k: Ref  # [ctx, kvh, dim]
    v: Ref  # [ctx, kvh, dim]
    out: Ref  # f32 [tok, head, dim]
    lse: Ref  # f32 [head, tok]
    q_tile: Ref  # [COMPUTING, ROWS, dim]
    k_tile: Ref  # [stages, kv, dim]
    v_tile: Ref  # [stages, kv, dim]
    weight_tile: Ref  # [COMPUTING, ROWS, kv]
    q_there: Ref  # barriers: [COMPUTING], the others [stages]
    k_there: Ref
    v_there: Ref
    k_used: Ref
    v_used: Ref


class Options(NamedTuple):
    """What is fixed at compile time."""

    sizes: Sizes
    group: int
    scale: float
    soft_cap: float | None
    windowed: bool
    weights_in_registers: bool


class Running(NamedTuple):
    """The online softmax of one warpgroup's rows. `top`: in base 2."""

    acc: tuple[jax.Array, ...]  # f32 [ROWS, columns], see `hopper.acc_columns`
    top: jax.Array  # f32 [ROWS]
    total: jax.Array  # f32 [ROWS]


def _place(target: Ref, options: Options, stage: Array):
    """Where a block of keys or values is fetched to."""
    return target.at[stage]


def _fetch(refs: Refs, options: Options, block: Array, head: Array) -> None:
    """The fetching warpgroup: K and V of each block in turn, as soon as both others are done with its place."""
    kv, stages = options.sizes
    kv_head = lax.div(head, jnp.int32(options.group))

    @pl.loop(0, refs.count[block])
    def _(step):
        stage = lax.rem(step, jnp.int32(stages))
        tokens = pl.ds(refs.lists[block, step] * kv, kv)
        for source, target, there, used in (
            (refs.k, refs.k_tile, refs.k_there, refs.k_used),
            (refs.v, refs.v_tile, refs.v_there, refs.v_used),
        ):
            pl.when(step >= stages)(lambda used=used: plgpu.barrier_wait(used.at[stage]))
            plgpu.copy_gmem_to_smem(source.at[tokens, kv_head], _place(target, options, stage), there.at[stage])


def _visible(refs: Refs, options: Options, key_block: Array, q_req: Array, q_pos: Array) -> Array:
    """bool [ROWS, kv]"""
    shape = (ROWS, options.sizes.kv)
    tokens = pl.ds(key_block * options.sizes.kv, options.sizes.kv)
    labels = [load(refs.kv_labels.at[row, tokens], layout=plgpu.Layout.WGMMA.reduce(0)) for row in range(2)]
    kv_req, kv_pos = (columns_to_tile(label, shape) for label in labels)
    position = rows_to_tile(q_pos, shape)
    seen = (rows_to_tile(q_req, shape) == kv_req) & (kv_pos <= position)
    return seen & (kv_pos > position - refs.window[0]) if options.windowed else seen


def _scores(refs: Refs, options: Options, mine: Array, stage: Array) -> Array:
    """f32 [ROWS, kv] in base 2."""

    def product(acc):
        plgpu.wgmma(acc, refs.q_tile.at[mine], refs.k_tile.at[stage].transpose((1, 0)))
        return acc[...]

    score = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, options.sizes.kv), jnp.float32))
    plgpu.barrier_arrive(refs.k_used.at[stage])
    if options.soft_cap is None:
        return score * (options.scale * LOG2E)
    return jnp.tanh(score * (options.scale / options.soft_cap)) * (options.soft_cap * LOG2E)


def _add_values(refs: Refs, options: Options, mine: Array, stage: Array, acc: tuple[Array, ...], weight: Array):
    """`acc` plus weight times V."""
    if not options.weights_in_registers:
        refs.weight_tile.at[mine][...] = weight
        plgpu.commit_smem()
    plgpu.barrier_wait(refs.v_there.at[stage])
    added = []
    for part, columns in zip(acc, acc_columns(refs.q.shape[2]), strict=True):
        values = refs.v_tile.at[stage, :, columns]

        def product(ref, values=values):
            plgpu.wgmma(ref, refs.weight_tile.at[mine], values)
            return ref[...]

        def accumulate(ref, values=values):
            plgpu.wgmma(ref, weight, values)

        if options.weights_in_registers:
            added.append(pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(part)))
        else:
            added.append(part + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, part.shape[1]), jnp.float32)))
    plgpu.barrier_arrive(refs.v_used.at[stage])
    return tuple(added)


def _compute(refs: Refs, options: Options, block: Array, head: Array, mine: Array) -> None:
    """A computing warpgroup: its 64 rows against each key block in turn."""
    kv, stages = options.sizes
    rows = pl.ds(block * BLOCK_Q + mine * ROWS, ROWS)
    of_rows = plgpu.Layout.WGMMA.reduce(1)
    plgpu.copy_gmem_to_smem(refs.q.at[rows, head], refs.q_tile.at[mine], refs.q_there.at[mine])
    q_req, q_pos = (load(refs.q_labels.at[row, rows], layout=of_rows) for row in range(2))
    plgpu.barrier_wait(refs.q_there.at[mine])

    def fold(step: Array, running: Running, masked: bool) -> Running:
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(refs.k_there.at[stage])
        score = _scores(refs, options, mine, stage)
        if masked:
            score = jnp.where(_visible(refs, options, refs.lists[block, step], q_req, q_pos), score, NEG)
        top = jnp.maximum(running.top, score.max(axis=1))
        # A query that has seen nothing has top == NEG and would weigh hidden keys exp(0): it is shifted by 0 instead.
        shift = jnp.where(top == NEG, 0.0, top) if masked else top
        weight = jnp.exp2(score - rows_to_tile(shift, score.shape))
        decay = jnp.exp2(running.top - top)
        total = running.total * decay + weight.sum(axis=1)
        acc = tuple(part * rows_to_tile(decay, part.shape) for part in running.acc)
        return Running(_add_values(refs, options, mine, stage, acc, weight.astype(jnp.bfloat16)), top, total)

    column = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), of_rows)
    running = Running(empty_acc(refs.q.shape[2]), column(NEG), column(0.0))
    running = lax.fori_loop(0, refs.whole[block], partial(fold, masked=False), running)
    running = lax.fori_loop(refs.whole[block], refs.count[block], partial(fold, masked=True), running)

    total = jnp.where(running.total > 0, running.total, 1.0)
    for part, columns in zip(running.acc, acc_columns(refs.q.shape[2]), strict=True):
        refs.out.at[rows, head, columns][...] = part * rows_to_tile(1.0 / total, part.shape)
    refs.lse.at[head, rows][...] = jnp.where(running.total > 0, running.top * LN2 + jnp.log(total), NEG)


def _kernel(*refs_in_order: Ref, options: Options) -> None:
    refs = Refs(*refs_in_order)
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    block = refs.order[lax.axis_index("block")]

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _compute(refs, options, block, head, warpgroup)

    @pl.when(warpgroup == COMPUTING)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(refs, options, block, head)


def _labels(req: Int[Array, " tok"], pos: Int[Array, " tok"], size: int, padding: int) -> Int[Array, "2 padded"]:
    """Request and position, filled up to whole blocks with padding."""
    labels = jnp.stack([jnp.where(req >= 0, req, padding), pos]).astype(jnp.int32)
    return jnp.pad(labels, ((0, 0), (0, -req.shape[0] % size)), constant_values=padding)


def _whole_tiles(a: Array, size: int) -> Array:
    """Filled up to whole blocks of `size` tokens and to a `dim` that shared memory takes."""
    return jnp.pad(a, ((0, -a.shape[0] % size), (0, 0), (0, -a.shape[2] % SWIZZLE_DIM)))


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
    block_kv: int | None = None,
    stages: int | None = None,
    weights_in_registers: bool = False,
    interpret: Any = False,
) -> Partial:
    """See `pallas_kernels.flash_partial`.

    block_kv: keys of a block, a multiple of 64; stages: blocks in shared memory at once; instead of the heuristic's.
    weights_in_registers: the form that has never run. interpret: run it in JAX, on CPU, by these InterpretGPUParams.
    Errors: NotImplementedError
    for dtypes, dims and versions of jax it does not serve, ValueError for other sizes.
    """
    require_jax()
    if not interpret:
        require_hopper()
    require_bfloat16(q=q, k=k, v=v)
    (tok, heads, dim), kvh = q.shape, k.shape[1]
    require_dim("dim", dim, 8)
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError(f"empty arrays: {q.shape}, {k.shape}")
    sizes = choose_sizes(dim + -dim % SWIZZLE_DIM, block_kv, stages)

    q_labels, kv_labels = _labels(q_req, q_pos, BLOCK_Q, NOBODY), _labels(kv_req, kv_pos, sizes.kv, -1)
    work = find_work(
        extents(*q_labels.reshape(2, -1, BLOCK_Q)), extents(*kv_labels.reshape(2, -1, sizes.kv)), window
    )  # fmt: skip
    v = jnp.where((kv_req >= 0)[:, None, None], v, 0)  # 0 * NaN is NaN: padding must be 0
    q, k, v = _whole_tiles(q, BLOCK_Q), _whole_tiles(k, sizes.kv), _whole_tiles(v, sizes.kv)
    limit = jnp.asarray(NO_WINDOW if window is None else window, jnp.int32).reshape(1)

    options = Options(sizes, heads // kvh, scale, soft_cap, window is not None, weights_in_registers)
    barriers = partial(plgpu.Barrier, num_barriers=sizes.stages)
    run = plgpu.kernel(
        partial(_kernel, options=options),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct((heads, q.shape[0]), jnp.float32),
        ),
        scratch_types=(
            tile((COMPUTING, ROWS, q.shape[2])),
            *[tile((sizes.stages, sizes.kv, q.shape[2]))] * 2,
            tile((COMPUTING, ROWS, sizes.kv)),
            plgpu.Barrier(num_barriers=COMPUTING),
            *[barriers()] * 2,
            *[barriers(num_arrivals=COMPUTING)] * 2,
        ),
        grid=(heads, q.shape[0] // BLOCK_Q),
        grid_names=("head", "block"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
        kernel_name="flash_partial",
    )
    out, lse = run(*work, limit, q_labels, kv_labels, q, k, v)
    return Partial(out[:tok, :, :dim], lse[:, :tok].T)
