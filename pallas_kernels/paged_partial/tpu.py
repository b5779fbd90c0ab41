"""`paged_partial` as a Pallas Mosaic TPU kernel.

Pages and table stay in HBM. A page is fetched when a query of its row sees some of it, otherwise neither fetched nor
computed; pages come in blocks, the next of which is in flight while one is computed, across the borders of rows
(`tpu_fetch.py`, `tpu_kernel.py`). Here: the arrays the kernel wants, and sizes from shapes and chip.

The table is reshaped to chunks of entries and the pool, for pages of few tokens, to rows; both are bitcasts in the
layouts that XLA gives these arrays. What would be a copy of the pool is refused. Of the two cores of a v4 or v5p
device, one runs the kernel. What it is not: a writer of pages (`storage.py` writes in place).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.chips import LANES, Chip, current_chip
from pallas_kernels.paged_partial.tpu_fetch import CHUNK, STATE_SIZE, SUBLANES, Plan
from pallas_kernels.paged_partial.tpu_kernel import kernel
from pallas_kernels.partial import Partial
from pallas_kernels.storage import decode_bits

MAX_QUERIES = 256
"""Queries of one KV head folded together: flops a byte of K and V, about what keeps a matrix unit busy."""
MERGED_QTOK = 8
"""Rows of so many tokens are a prompt's, and neighbours mostly of one request, so that they share their entries."""
BLOCK_BYTES = 2 << 20
"""Large against the latency of a fetch times the bandwidth of any TPU's HBM."""
BLOCK_TOKENS = 2048
FOLD_TOKENS = 512
STEP_BYTES = 1 << 20
TILE_CHUNKS = 8
NO_WINDOW = 2**30


class Runs(NamedTuple):
    """Neighbouring rows of one unit with the same entries are one *run*: fetched once, for all of them. The fields
    stand at a run's first row; the other rows have length 0, as have rows that see nothing."""

    start: Int[Array, " row"]
    length: Int[Array, " row"]
    lowest: Int[Array, " row"]  # of the run's positions of queries
    highest: Int[Array, " row"]
    following: Int[Array, " row"]  # the first row of the next run; num_rows: none
    end: Int[Array, " row"]  # one beyond the run's last row


def find_runs(
    q_pos: Int[Array, "row qtok"], row_start: Int[Array, " row"], row_len: Int[Array, " row"], unit_rows: int
) -> tuple[Runs, Int[Array, ""]]:
    """The runs, and the first row of the first one. The number of rows is a multiple of `unit_rows`."""
    num_rows = q_pos.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    highest = q_pos.max(axis=1)
    lowest = jnp.where(q_pos < 0, NO_WINDOW, q_pos).min(axis=1)
    length = jnp.where(highest < 0, 0, row_len)
    end = row + 1
    if unit_rows > 1:
        by_unit = lambda a: a.reshape(-1, unit_rows)
        ranges = jnp.stack([jnp.where(length > 0, row_start, 0), length], axis=1)
        changes = jnp.concatenate([jnp.ones(1, bool), (ranges[1:] != ranges[:-1]).any(axis=1)])
        changes |= row % unit_rows == 0
        run = by_unit(jnp.cumsum(changes))
        same = run[:, :, None] == run[:, None, :]
        over_run = lambda a, fill, reduce: reduce(jnp.where(same, by_unit(a)[:, None], fill), axis=2).reshape(-1)
        highest, lowest = over_run(highest, -1, jnp.max), over_run(lowest, NO_WINDOW, jnp.min)
        end = over_run(end, 0, jnp.max)
        length = jnp.where(changes, length, 0)
    here_or_later = lax.cummin(jnp.where(length > 0, row, num_rows), reverse=True)
    following = jnp.append(here_or_later[1:], jnp.int32(num_rows))
    return Runs(row_start, length, lowest, highest, following, end), here_or_later[0]


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _unit_bytes(plan: Plan, q_itemsize: int) -> int:
    """Of one unit's queries and partial in VMEM."""
    rows = _round_up(plan.queries, 2 * SUBLANES)
    return plan.kvh * (rows * plan.pool_dim * (q_itemsize + 4) + 4 * SUBLANES * _round_up(rows, LANES))


def vmem_bytes(plan: Plan, q_itemsize: int, pool_itemsize: int) -> int:
    """An upper estimate of what a step keeps in VMEM: queries and partials twice, as the pipeline does, the two halves
    of the buffer, the online softmax, and the tiles of one head's fold."""
    rows, fold = _round_up(plan.queries, 2 * SUBLANES), plan.fold_pages * plan.page_tokens
    piped = 2 * plan.step_units * _unit_bytes(plan, q_itemsize)
    softmax = 4 * plan.kvh * rows * (plan.pool_dim + 2 * LANES)
    buffer = 2 * plan.block_pages * math.prod(plan.page_shape) * pool_itemsize
    tiles = 4 * rows * (4 * _round_up(fold, LANES) + 2 * plan.pool_dim) + 4 * 4 * fold * plan.pool_dim
    return piped + softmax + buffer + tiles


def smem_bytes(plan: Plan) -> int:
    """What the kernel keeps in SMEM: runs and positions of queries, two tiles of the table, the pages of two blocks."""
    words = plan.num_rows * (len(Runs._fields) + plan.qtok) + 2 * plan.tile_chunks * 4 * CHUNK + 4 * plan.block_pages
    return 4 * words


def choose_plan(plan: Plan, chip: Chip, q_itemsize: int, pool_itemsize: int, **overrides: int | None) -> Plan:
    """`plan` with the sizes of units, steps and blocks for `chip`, but `overrides` that are not None. Its `num_rows`
    is filled up to whole units."""
    given = {name: size for name, size in overrides.items() if size is not None}
    page_bytes = math.prod(plan.page_shape) * pool_itemsize
    row_queries = plan.qtok * plan.group
    fold = max(1, min(FOLD_TOKENS // plan.page_tokens, BLOCK_BYTES // page_bytes))
    if "block_pages" in given:
        fold = max(n for n in range(1, fold + 1) if given["block_pages"] % n == 0)
    fold = given.get("fold_pages", fold)
    block = max(1, min(BLOCK_BYTES // page_bytes, BLOCK_TOKENS // plan.page_tokens) // fold) * fold
    unit = max(1, min(MAX_QUERIES // row_queries, plan.num_rows)) if plan.qtok >= MERGED_QTOK else 1
    sizes = {"unit_rows": unit, "block_pages": block, "fold_pages": fold} | given
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: must be positive, not {size}")
    if sizes["block_pages"] % sizes["fold_pages"]:
        raise ValueError(f"block_pages: {sizes['block_pages']} is no multiple of fold_pages, {sizes['fold_pages']}")

    while True:
        unit = sizes["unit_rows"]
        num_units = pl.cdiv(plan.num_rows, unit)
        chosen = plan._replace(**sizes | {"num_rows": num_units * unit})
        step = max(1, min(num_units, STEP_BYTES // _unit_bytes(chosen, q_itemsize)))
        chosen = chosen._replace(step_units=given.get("step_units", step))
        if vmem_bytes(chosen, q_itemsize, pool_itemsize) <= chip.vmem_limit_bytes:
            break
        if unit > 1 and "unit_rows" not in given:
            sizes["unit_rows"] = unit // 2
        elif sizes["block_pages"] > sizes["fold_pages"] and "block_pages" not in given:
            sizes["block_pages"] = sizes["fold_pages"]
        elif sizes["fold_pages"] > 1 and "fold_pages" not in given and "block_pages" not in given:
            sizes["block_pages"] = sizes["fold_pages"] = sizes["fold_pages"] // 2
        else:
            raise NotImplementedError(f"VMEM: {chosen} takes more than {chip.name} has")
    if smem_bytes(chosen) > chip.smem_limit_bytes:
        raise NotImplementedError(
            f"SMEM: {plan.num_rows} rows of {plan.qtok} tokens are more than {chip.name} can hold"
        )
    return chosen


def _refuse(q: Array, kv_pages: Array) -> None:
    page_tokens, pool_dim = kv_pages.shape[4:]
    for name, dtype in (("q", q.dtype), ("kv_pages", kv_pages.dtype)):
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name}: float32 or bfloat16, not {dtype}")
    if q.size == 0:
        raise NotImplementedError(f"q: empty, {q.shape}")
    if pool_dim % LANES:
        raise NotImplementedError(f"pool_dim: a multiple of {LANES}, else the pool would be copied, not {pool_dim}")
    if page_tokens % SUBLANES and page_tokens not in (1, 2, 4):
        raise NotImplementedError(f"page_tokens: 1, 2, 4 or a multiple of {SUBLANES}, not {page_tokens}")
    if page_tokens in (2, 4) and pool_dim > LANES:
        raise NotImplementedError(f"page_tokens: pages of {page_tokens} would be copied at pool_dim {pool_dim}")


def _scratch(plan: Plan, pool_dtype: jnp.dtype) -> list:
    smem = lambda *shape: pltpu.SMEM(shape, jnp.int32)
    tile = (2, plan.tile_chunks, 3, CHUNK)
    return [
        pltpu.VMEM((2, plan.block_pages, *plan.page_shape), pool_dtype),
        smem(*tile),
        pltpu.VMEM(tile, jnp.int32),
        smem(STATE_SIZE),
        *[smem(2 * plan.block_pages)] * 2,
        *[smem(2)] * 3,
        pltpu.VMEM((plan.queries, 1), jnp.int32),
        *[pltpu.VMEM((plan.kvh, plan.queries, LANES), jnp.float32)] * 2,
        pltpu.VMEM((plan.kvh, plan.queries, plan.pool_dim), jnp.float32),
        *[pltpu.SemaphoreType.DMA((2,))] * 2,
    ]


def _cost(plan: Plan, pool: Array, units: Array) -> pl.CostEstimate:
    """For the scheduler: as if the rows held all pages, or as many as the table can name."""
    pages = min(plan.num_chunks * CHUNK, pool.shape[1])
    products = pages * plan.page_tokens * plan.kvh * plan.queries
    page_bytes = math.prod(plan.page_shape) * pool.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * products * plan.pool_dim,
        transcendentals=products,
        bytes_accessed=pages * page_bytes + units.size * (units.dtype.itemsize + 4),
    )


def _call(
    plan: Plan,
    scalars: Int[Array, "3"],
    runs: Runs,
    q_pos: Int[Array, "row qtok"],
    units: Float[Array, "unit kvh query pool_dim"],
    table: Int[Array, "chunk 3 entry"],
    pool: Array,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "unit kvh query pool_dim"], Float[Array, "unit kvh 1 query"]]:
    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((plan.step_units, *shape), lambda step, *_: (step, *[0] * len(shape)))

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    matrix = (plan.kvh, plan.queries, plan.pool_dim)
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        out_shape=(
            jax.ShapeDtypeStruct(units.shape, jnp.float32),
            jax.ShapeDtypeStruct((*units.shape[:2], 1, plan.queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(runs),
            grid=(pl.cdiv(units.shape[0], plan.step_units),),
            in_specs=[block(*matrix), in_hbm, in_hbm],
            out_specs=[block(*matrix), block(plan.kvh, 1, plan.queries)],
            scratch_shapes=_scratch(plan, pool.dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=chip.vmem_limit_bytes
        ),
        cost_estimate=_cost(plan, pool, units),
        interpret=interpret,
        name="paged_partial",
    )(scalars, *runs, q_pos.reshape(-1), units, table, pool)


def _to_units(q: Float[Array, "row qtok head dim"], plan: Plan) -> Float[Array, "unit kvh query pool_dim"]:
    """Rows filled up to whole units and dim to pool_dim; queries of one KV head together, token by token."""
    rows, qtok, _, dim = q.shape
    q = jnp.pad(q, ((0, plan.num_rows - rows), (0, 0), (0, 0), (0, plan.pool_dim - dim)))
    q = q.reshape(-1, plan.unit_rows, qtok, plan.kvh, plan.group, plan.pool_dim).transpose(0, 3, 1, 2, 4, 5)
    return q.reshape(-1, plan.kvh, plan.queries, plan.pool_dim)


def _from_units(a: Float[Array, "unit kvh query n"], plan: Plan, rows: int) -> Float[Array, "row qtok head n"]:
    a = a.reshape(-1, plan.kvh, plan.unit_rows, plan.qtok, plan.group, a.shape[3]).transpose(0, 2, 3, 1, 4, 5)
    return a.reshape(plan.num_rows, plan.qtok, plan.kvh * plan.group, a.shape[5])[:rows]


def paged_partial(
    q: Float[Array, "row qtok head dim"],
    q_pos: Int[Array, "row qtok"],
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    entries: Int[Array, "entry 3"],
    row_start: Int[Array, " row"],
    row_len: Int[Array, " row"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    unit_rows: int | None = None,
    step_units: int | None = None,
    block_pages: int | None = None,
    fold_pages: int | None = None,
    chip: Chip | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """See `pallas_kernels.paged_partial`.

    unit_rows, step_units, block_pages, fold_pages: sizes (see `Plan`) instead of the heuristic's. chip: instead of the
    one the program is traced for. interpret: run it in JAX, on any platform. Errors: NotImplementedError for dtypes,
    layouts and sizes it does not serve, ValueError for sizes that can not be.
    """
    kv_pages = decode_bits(kv_pages)
    _refuse(q, kv_pages)
    num_rows, qtok, heads, dim = q.shape
    kvh, page_tokens, pool_dim = kv_pages.shape[3:]
    group, chip = heads // kvh, chip or current_chip()
    # A row of very many queries is several rows with the same entries.
    part = max(n for n in range(1, qtok + 1) if qtok % n == 0 and (n == 1 or n * group <= MAX_QUERIES))
    rows = num_rows * qtok // part
    num_chunks = max(1, pl.cdiv(entries.shape[0], CHUNK))
    plan = choose_plan(
        Plan(
            num_rows=rows, qtok=part, group=group, kvh=kvh, page_tokens=page_tokens, pool_dim=pool_dim,
            num_chunks=num_chunks, tile_chunks=min(TILE_CHUNKS, num_chunks), scale=scale, soft_cap=soft_cap,
        ),
        chip, q.dtype.itemsize, kv_pages.dtype.itemsize,
        unit_rows=unit_rows, step_units=step_units, block_pages=block_pages, fold_pages=fold_pages,
    )  # fmt: skip

    fill = (0, plan.num_rows - rows)
    positions = jnp.pad(q_pos.reshape(rows, part), (fill, (0, 0)), constant_values=-1)
    start, length = (jnp.pad(jnp.repeat(a, qtok // part), fill) for a in (row_start, row_len))
    runs, first_row = find_runs(positions, start, length, plan.unit_rows)
    scalars = jnp.stack([jnp.int32(layer), jnp.int32(NO_WINDOW if window is None else window), first_row])
    table = jnp.pad(entries, ((0, num_chunks * CHUNK - entries.shape[0]), (0, 0)))
    table = table.reshape(num_chunks, CHUNK, 3).swapaxes(1, 2)
    pool = kv_pages.reshape(*kv_pages.shape[:2], *plan.page_shape)
    units = _to_units(q.reshape(rows, part, heads, dim), plan)
    out, lse = _call(plan, scalars, runs, positions, units, table, pool, chip, interpret)
    out, lse = _from_units(out, plan, rows), _from_units(lse.swapaxes(2, 3), plan, rows)
    return Partial(out.reshape(num_rows, qtok, heads, pool_dim)[..., :dim], lse.reshape(num_rows, qtok, heads))
