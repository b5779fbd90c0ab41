"""What is the TPU kernel's own: runs of rows, sizes, refusals, and the order of its copies.

That it is right is `test_conformance.py`, that it compiles `test_tpu_compile.py`.
"""

import json
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import chips
from pallas_kernels.paged_partial import blockwise, paged_partial, tpu
from pallas_kernels.paged_partial.tpu_fetch import Plan
from pallas_kernels.storage import write_slots

ROOT = Path(__file__).resolve().parents[2]


def plain_runs(q_pos, start, length, unit_rows):
    """first row -> (start, length, lowest, highest, end), row by row."""
    runs, previous = {}, None
    for row, positions in enumerate(q_pos):
        seen = [p for p in positions if p >= 0]
        entries = (start[row], length[row]) if seen and length[row] else None
        if entries and entries == previous and row % unit_rows:
            first = max(runs)
            lowest, highest = runs[first][2:4]
            runs[first] = (*entries, min([lowest, *seen]), max([highest, *seen]), row + 1)
        elif entries:
            runs[row] = (*entries, min(seen), max(seen), row + 1)
        previous = entries
    return runs


@pytest.mark.parametrize("unit_rows", [1, 2, 4, 12])
def test_runs_are_neighbours_of_one_unit_with_the_same_entries(unit_rows: int):
    rng = random.Random(unit_rows)
    for _ in range(20):
        ranges = [(rng.randrange(3), rng.randrange(3)) for _ in range(3)]
        start, length = zip(*[rng.choice(ranges) for _ in range(12)], strict=True)
        q_pos = [[rng.choice([-1, rng.randrange(90)]) for _ in range(2)] for _ in range(12)]
        got, first = tpu.find_runs(*(jnp.asarray(a, jnp.int32) for a in (q_pos, start, length)), unit_rows)
        want = plain_runs(q_pos, start, length, unit_rows)
        columns = np.stack([got.start, got.length, got.lowest, got.highest, got.end], 1).tolist()
        assert {row: tuple(c) for row, c in enumerate(columns) if c[1]} == want
        chain, row = [], int(first)
        while row < 12:
            chain.append(row)
            row = int(got.following[row])
        assert chain == sorted(want)


def plan_of(**changes) -> Plan:
    sizes = {"num_rows": 128, "qtok": 1, "group": 4, "kvh": 8, "page_tokens": 16, "pool_dim": 128, "num_chunks": 64}
    return Plan(**{**sizes, "tile_chunks": 8, "scale": 1.0, "soft_cap": None, **changes})


@pytest.mark.parametrize("chip", [*chips.CHIPS, chips.UNKNOWN], ids=lambda chip: chip.name)
@pytest.mark.parametrize("page_tokens", [1, 16, 128])
def test_sizes_fit_the_chip(chip: chips.Chip, page_tokens: int):
    for kvh, group, pool_dim in ((1, 8, 128), (8, 4, 128), (32, 1, 128), (16, 1, 256)):
        for qtok in (1, 4, 16):
            shapes = {"page_tokens": page_tokens, "kvh": kvh, "group": group, "pool_dim": pool_dim, "qtok": qtok}
            plan = tpu.choose_plan(plan_of(**shapes), chip, 2, 2)
            assert tpu.vmem_bytes(plan, 2, 2) <= chip.vmem_limit_bytes
            assert plan.block_pages % plan.fold_pages == 0 == plan.num_rows % plan.unit_rows
            assert plan.fold_pages * page_tokens <= max(tpu.FOLD_TOKENS, page_tokens)
            # large blocks, unless one page is
            page_bytes = math.prod(plan.page_shape) * 2
            tokens = plan.block_pages * page_tokens
            assert plan.block_pages * page_bytes >= tpu.BLOCK_BYTES // 2 or tokens == tpu.BLOCK_TOKENS


def test_rows_of_a_prompt_are_folded_together_and_those_of_decode_are_not():
    assert tpu.choose_plan(plan_of(qtok=16), chips.chip_of("TPU v5e"), 2, 2).unit_rows == 4
    assert tpu.choose_plan(plan_of(qtok=1), chips.chip_of("TPU v5e"), 2, 2).unit_rows == 1


def test_sizes_may_be_given():
    chip = chips.chip_of("TPU v5e")
    plan = tpu.choose_plan(plan_of(num_rows=10), chip, 2, 2, unit_rows=4, step_units=2, block_pages=12, fold_pages=None)
    assert (plan.unit_rows, plan.step_units, plan.block_pages, plan.num_rows) == (4, 2, 12, 12)
    assert plan.fold_pages == 12
    with pytest.raises(ValueError, match="block_pages: 12 is no multiple"):
        tpu.choose_plan(plan_of(), chip, 2, 2, block_pages=12, fold_pages=5)
    with pytest.raises(ValueError, match="unit_rows: must be positive"):
        tpu.choose_plan(plan_of(), chip, 2, 2, unit_rows=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(NotImplementedError, match=r"VMEM: .* v4"):
        tpu.choose_plan(plan_of(page_tokens=1024, kvh=32), chips.chip_of("TPU v4"), 2, 2)
    with pytest.raises(NotImplementedError, match="SMEM: 100000 rows"):
        tpu.choose_plan(plan_of(num_rows=100_000), chips.chip_of("TPU v5e"), 2, 2)


def arguments(page_tokens=16, pool_dim=128, dtype="float32", dim=64) -> dict:
    return {
        "q": jnp.zeros((2, 1, 4, dim), dtype),
        "q_pos": jnp.zeros((2, 1), jnp.int32),
        "kv_pages": jnp.zeros((1, 4, 2, 2, page_tokens, pool_dim), dtype),
        "layer": 0,
        "entries": jnp.zeros((8, 3), jnp.int32),
        "row_start": jnp.zeros(2, jnp.int32),
        "row_len": jnp.zeros(2, jnp.int32),
        "scale": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool_dim": 64}, "pool_dim: a multiple of 128"),
        ({"page_tokens": 12}, "page_tokens: 1, 2, 4 or a multiple of 8, not 12"),
        ({"page_tokens": 2, "pool_dim": 256}, "page_tokens: pages of 2 would be copied"),
        ({"dtype": "float16"}, "q: float32 or bfloat16, not float16"),
    ],
)
def test_what_would_copy_the_pool_is_refused_and_served_by_blockwise(changes: dict, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        tpu.paged_partial(**arguments(**changes))
    assert paged_partial(**arguments(**changes), platform="tpu").out.shape == (2, 1, 4, 64)


def test_it_runs_in_a_scan_of_layers_on_every_device():
    """As a decode step has it: the pool is the carry, layer and window are traced, each device has rows of its own."""
    rows, kvh, dim, pages = 3, 2, 64, 12
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    pool, q, kv = normal(2, 2, pages, 2, kvh, 8, 128), normal(2, rows, 1, 4, dim), normal(2, 2, rows, kvh, dim)
    integers = lambda most, *shape: jnp.asarray(rng.integers(0, most, (2, *shape)), jnp.int32)
    position = 8 * jnp.arange(pages, dtype=jnp.int32)[None] + jnp.zeros((2, 1), jnp.int32)
    table = jnp.stack([integers(pages, pages), position, 1 + integers(8, pages)], axis=-1)
    start, length = integers(5, rows), integers(8, rows)
    write = jnp.asarray([rng.permutation(pages)[:rows] for _ in range(2)], jnp.int32)

    def decode(attention, pool, q, kv, table, start, length, write):
        pool, q, kv, table, start, length, write = (a[0] for a in (pool, q, kv, table, start, length, write))

        def layer_step(carry, layer):
            pool, q = carry
            pool = write_slots(pool, layer, write, write % 8, *kv)
            seen = {"row_start": start, "row_len": length, "entries": table, "window": 50 + 30 * layer}
            part = attention(q, jnp.full((rows, 1), 90), pool, layer, **seen, scale=0.2)
            return (pool, part.out), part.lse

        (pool, out), lse = lax.scan(layer_step, (pool, q), jnp.arange(2))
        return pool[None], out[None], lse[None]

    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",))
    interpreted = partial(tpu.paged_partial, interpret=pltpu.InterpretParams())
    results = [
        jax.jit(jax.shard_map(partial(decode, f), mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False))(
            pool, q, kv, table, start, length, write
        )
        for f in (interpreted, blockwise.paged_partial)
    ]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_pages_that_no_query_sees_are_not_fetched():
    """Their entries name pages that are not there, at which the interpreter fails."""
    kwargs = arguments(page_tokens=8) | {"q": jnp.ones((2, 1, 4, 64)), "row_start": jnp.asarray([0, 40])}
    rng = np.random.default_rng(0)
    kwargs["kv_pages"] = jnp.asarray(rng.standard_normal((1, 4, 2, 2, 8, 128)), jnp.float32)
    entries = np.stack([np.full(80, 10**6), 8 * np.arange(80) % 320, np.full(80, 8)], axis=1)
    rows = ((0, 40, 100, 30), (40, 40, 319, 30))  # first entry, entries, position, window
    for first, num, position, window in rows:
        seen = (entries[:, 1] <= position) & (entries[:, 1] + 7 > position - window)
        seen &= (np.arange(80) >= first) & (np.arange(80) < first + num)
        entries[seen, 0] = rng.permutation(np.arange(seen.sum()) % 4)
    entries = {"entries": jnp.asarray(entries, jnp.int32), "row_len": jnp.asarray([40, 40])}
    kwargs |= entries | {"q_pos": jnp.asarray([[100], [319]])}
    run = jax.jit(lambda window: tpu.paged_partial(**kwargs, window=window, interpret=pltpu.InterpretParams()))
    for a, b in zip(run(30), blockwise.paged_partial(**kwargs, window=30), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        jax.block_until_ready(run(31 + 8))
    pltpu.reset_tpu_interpret_mode_state()


CAUGHT = {
    "none,eager,3": set(),
    "dropped wait,eager,1": {"race"},
    "missing final wait,eager,1": {"semaphore"},
    "swapped slot,on_wait,1": {"numbers"},
}
MORE = {
    "none,eager,20": set(),
    "none,on_wait,5": set(),
    "dropped wait,on_wait,1": {"numbers"},
    "missing final wait,on_wait,1": {"numbers"},
    "swapped slot,eager,1": {"numbers"},
}


@pytest.mark.parametrize("expected", [CAUGHT, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_copies_do_not_race_and_wrong_orders_are_caught(expected: dict[str, set[str]]):
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.paged_races", *expected],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    signs = {report["word"]: set(report["signs"]) for report in reports}
    assert signs.keys() == expected.keys()
    for word, least in expected.items():
        assert signs[word] >= least, (word, signs)
        assert bool(signs[word]) == bool(least), (word, signs)
