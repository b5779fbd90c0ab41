"""The TPU kernel of `flash_partial`, interpreted: its steps, its blocks, and its use inside programs.

That it gives right answers is shown by `test_conformance.py`, that it compiles for TPUs by `test_tpu_compile.py`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.chips import CHIPS, UNKNOWN
from pallas_kernels.flash_partial import flash_partial, tpu
from pallas_kernels.flash_partial.visibility import extents
from pallas_kernels.partial import Partial
from tests.pallas_kernels import cases
from tests.pallas_kernels.test_conformance import check

STRIPED = cases.FlashCase("nested", cases.striped, tok=256, ctx=384)
SMALL = {"scale": STRIPED.dim**-0.5, "interpret": True, "block_q": 128, "block_kv": 128}


def steps_of(layout, window=None, first=0, num_q=32):
    """(query block, key block, flags) of each step, of 512 queries and 768 keys in blocks of 16."""
    sides = [jnp.asarray(a.reshape(-1, 16), jnp.int32) for a in layout(np.random.default_rng(3), 512, 768)]
    q, kv = extents(*sides[:2]), extents(*sides[2:])
    words, count = jax.jit(lambda: tpu.step_list(q, kv, window, first, num_q))()
    unpack = lambda w: (w >> tpu.Q_SHIFT, w >> tpu.KV_SHIFT & (tpu.MAX_KV_BLOCKS - 1), w & 15)
    return [unpack(w) for w in np.asarray(words)[: int(count)].tolist()], sides


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("layout", [cases.causal, cases.striped, cases.ragged, cases.all_padding, cases.future])
def test_steps_are_the_pairs_that_see_something(layout, window):
    steps, (q_req, q_pos, kv_req, kv_pos) = steps_of(layout, window)
    q_req, q_pos = q_req[:, None, :, None], q_pos[:, None, :, None]
    visible = (q_req == kv_req[:, None]) & (q_req >= 0) & (kv_pos[:, None] <= q_pos)
    visible &= q_pos - kv_pos[:, None] < (window or 2**30)
    some, whole = np.asarray(visible.any(axis=(2, 3))), np.asarray(visible.all(axis=(2, 3)))
    working = {(q, kv): flags for q, kv, flags in steps if flags & tpu.SOME}
    needed = set(zip(*(a.tolist() for a in np.nonzero(some)), strict=True))
    assert needed <= set(working)
    assert len(working) <= 1.05 * len(needed)
    assert {pair for pair, flags in working.items() if flags & tpu.ALL} == set(
        zip(*(a.tolist() for a in np.nonzero(whole)), strict=True)
    )
    assert len(steps) - len(working) == 32 - len({q for q, _ in working}), "one idle step for each blind query block"


@pytest.mark.parametrize("layout", [cases.causal, cases.ragged, cases.all_padding])
def test_each_query_block_starts_once_and_ends_once_in_order(layout):
    steps, _ = steps_of(layout, first=20, num_q=20)
    assert [q for q, _ in itertools.groupby(steps, key=lambda s: s[0])] == list(range(12)), "there are 32 in all"
    for _, group in itertools.groupby(steps, key=lambda s: s[0]):
        flags = [flags & (tpu.FIRST | tpu.LAST) for _, _, flags in group]
        assert flags[0] & tpu.FIRST
        assert flags[-1] & tpu.LAST
        assert sum(f & tpu.FIRST for f in flags) == tpu.FIRST
        assert sum(f & tpu.LAST for f in flags) == tpu.LAST


@pytest.mark.parametrize("chip", [*CHIPS, UNKNOWN], ids=lambda chip: chip.name)
def test_blocks_fit_the_chip(chip):
    sizes = itertools.product((1, 500, 8192), (1, 300, 2**20), (1, 4, 7, 64), (16, 80, 128, 256), (2, 4))
    for tok, ctx, group, dim, itemsize in sizes:
        blocks = tpu.choose_blocks(chip, tok, ctx, group, dim, itemsize, None, None)
        assert tpu.vmem_bytes(blocks, dim, itemsize) <= chip.vmem_limit_bytes
        assert group % blocks.heads == 0
        assert blocks.q % 128 == blocks.kv % 128 == 0
        assert 128 <= blocks.heads * blocks.q <= tpu.TILE_ROWS


def test_blocks_given_are_taken_and_checked():
    assert tpu.choose_blocks(CHIPS[1], 4096, 4096, 4, 128, 2, 384, 1024) == (4, 384, 1024)
    with pytest.raises(ValueError, match="block_q: must be a positive multiple of 128, not 100"):
        tpu.choose_blocks(CHIPS[1], 4096, 4096, 4, 128, 2, 100, None)
    with pytest.raises(NotImplementedError, match="VMEM"):
        tpu.choose_blocks(UNKNOWN, 4096, 4096, 4, 128, 2, 4096, 4096)


def test_more_steps_than_smem_holds_take_several_calls():
    """Also where the last call has fewer query blocks, and the last block fewer queries."""
    case = cases.FlashCase("calls", cases.ragged, tok=600, ctx=300)
    inputs = cases.flash_inputs(case)
    chip = UNKNOWN._replace(smem_bytes=2 * 4 * 7)  # lists of 7 steps: two query blocks of three key blocks
    run = jax.jit(lambda kw: tpu.flash_partial(**kw, **SMALL, chip=chip))
    check(run(inputs), cases.dense_flash(case, inputs, SMALL["scale"]), 2e-6)
    with pytest.raises(NotImplementedError, match="SMEM"):
        tpu.flash_partial(**inputs, **SMALL, chip=chip._replace(smem_bytes=16))


def test_the_blocks_of_the_heuristic():
    case = cases.FlashCase("large blocks", cases.ragged, tok=700, ctx=1100, heads=8, kvh=2)
    inputs = cases.flash_inputs(case)
    run = jax.jit(lambda kw: tpu.flash_partial(**kw, scale=0.1, interpret=True))
    check(run(inputs), cases.dense_flash(case, inputs, 0.1), 2e-6)


def test_inside_shard_map_scan_and_a_loop_of_dynamic_length():
    """As the engine uses it: other keys on each rank, in a loop whose length is data, inside a scan over layers."""
    inputs = cases.flash_inputs(STRIPED)
    want = cases.dense_flash(STRIPED, inputs, SMALL["scale"])
    zeros = Partial(jnp.zeros(want.out.shape), jnp.zeros(want.lse.shape))

    def program(k, v, arrays, trips):
        def layer(_, __):
            return lax.fori_loop(
                0, trips, lambda i, _: tpu.flash_partial(k=k[0], v=v[0], **arrays, **SMALL), zeros
            ), None

        return jax.tree.map(lambda a: a[None], lax.scan(layer, zeros, None, length=2)[0])

    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",))
    specs = (P("sp"), P("sp"), P(), P())
    mapped = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P("sp"), check_vma=False)
    k, v = (jnp.stack([inputs[name], 2 * inputs[name]]) for name in "kv")
    arrays = {name: a for name, a in inputs.items() if name not in "kv"}
    got = jax.jit(mapped)(k, v, arrays, jnp.int32(2))
    check(Partial(got.out[0], got.lse[0]), want, 2e-6)
    doubled = cases.dense_flash(STRIPED, inputs | {"k": k[1], "v": v[1]}, SMALL["scale"])
    check(Partial(got.out[1], got.lse[1]), doubled, 2e-6)


def test_what_it_refuses_goes_to_the_blockwise_path():
    inputs = cases.flash_inputs(cases.FlashCase("odd dim", cases.causal, tok=16, ctx=16, dim=20))
    with pytest.raises(NotImplementedError, match="dim: a multiple of 8 up to 256, not 20"):
        tpu.flash_partial(**inputs, scale=1.0)
    mixed = inputs | {"k": inputs["k"].astype(jnp.bfloat16)}
    with pytest.raises(NotImplementedError, match="dtypes"):
        tpu.flash_partial(**mixed, scale=1.0)
    assert flash_partial(**inputs, scale=1.0, platform="tpu").out.shape == (16, 4, 20)
