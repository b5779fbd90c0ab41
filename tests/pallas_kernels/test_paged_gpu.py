"""What is the GPU kernel's own in `paged_partial`: how the context is shared out and merged again, and its sizes.

That it is right is `test_conformance.py`, its barriers `test_gpu_races.py`, that it compiles `test_gpu_compile.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import SMEM_LIMIT_BYTES
from pallas_kernels.paged_partial import gpu
from pallas_kernels.paged_partial.gpu_kernel import START, STOP, Plan, smem_bytes
from pallas_kernels.partial import NEG, Partial, empty, merge


@pytest.mark.parametrize("lengths", [(0, 0), (1,), (5, 0, 1000, 3, 0), (70_000, 1, 1), (64,) * 20])
def test_items_hold_each_entry_of_each_row_once(lengths: tuple[int, ...]):
    lengths += (0,) * (20 - len(lengths))
    start = jnp.asarray(np.random.default_rng(0).integers(0, 99, len(lengths)), jnp.int32)
    items, row = jax.tree.map(np.asarray, gpu.share_out(start, jnp.asarray(lengths, jnp.int32), 4, 33))
    assert len(items) == 33 + len(lengths)
    busy = items[:, STOP] > items[:, START]
    np.testing.assert_array_equal(busy, row < len(lengths))
    for index, length in enumerate(lengths):
        mine = items[row == index]
        at = start[index]
        for _, first, stop, _ in mine:
            assert first == at
            at = stop
        assert at == start[index] + length
    sizes = (items[:, STOP] - items[:, START])[busy]
    assert sizes.max(initial=0) <= max(4 * gpu.ITEM_BLOCKS, 4 * -(-sum(-(-n // 4) for n in lengths) // 33))


def test_a_bracket_holds_what_is_seen_and_no_more():
    rng = np.random.default_rng(1)
    for _ in range(20):
        entries = np.stack([rng.integers(0, 9, 60), 8 * rng.permutation(60), rng.integers(0, 9, 60)], 1)
        start, length, window = rng.integers(0, 30, 4), rng.integers(0, 30, 4), int(rng.integers(1, 300))
        low = rng.integers(0, 480, 4)
        reach = np.stack([low, low + rng.integers(0, 20, 4)], 1)
        arrays = (jnp.asarray(a, jnp.int32) for a in (entries, start, length, reach))
        got_start, got_length = gpu.bracket(*arrays, window)
        for row in range(4):
            mine = np.arange(start[row], start[row] + length[row])
            _, first, count = entries[mine].T
            seen = (count > 0) & (first <= reach[row, 1]) & (first + count - 1 > reach[row, 0] - window)
            assert got_length[row] == (np.ptp(mine[seen]) + 1 if seen.any() else 0)
            assert not seen.any() or got_start[row] == mine[seen].min()


def test_parts_of_a_row_merge_to_the_row():
    rng = np.random.default_rng(2)
    row = jnp.asarray([0, 0, 0, 2, 3, 3, 5, 5], jnp.int32)  # 5: no row, whose parts may hold anything
    out, lse = rng.standard_normal((8, 2, 8, 4)), 9 * rng.standard_normal((8, 2, 8))
    out[3:5], lse[3:5] = 0, NEG
    out[6:], lse[6:] = np.nan, np.nan
    parts = Partial(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))
    got = gpu.merge_items(parts, row, 5)
    for index in range(5):
        want = empty((2, 8, 4))
        for item in np.flatnonzero(row == index):
            want = merge(want, jax.tree.map(lambda a, item=item: a[item], parts))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[index], b, rtol=2e-6, atol=2e-6)


def plan_of(**changes) -> Plan:
    sizes = {"kvh": 8, "queries": 8, "page_tokens": 16, "dim": 128, "num_pages": 99, "block_pages": 1, "stages": 2}
    return Plan(**{**sizes, "scale": 1.0, "soft_cap": None, "windowed": False, **changes})


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("page_tokens", gpu.PAGE_TOKENS)
def test_sizes_fit_a_multiprocessor(page_tokens: int, dim: int):
    if dim > 128 and page_tokens == 128:
        with pytest.raises(NotImplementedError, match="shared memory: "):
            gpu.choose_plan(plan_of(page_tokens=page_tokens, dim=dim), None, None)
        return
    plan = gpu.choose_plan(plan_of(page_tokens=page_tokens, dim=dim), None, None)
    assert smem_bytes(plan) <= SMEM_LIMIT_BYTES
    assert plan.block_tokens == max(64, page_tokens)


def test_sizes_may_be_given_and_are_checked():
    plan = gpu.choose_plan(plan_of(), 8, 2)
    assert (plan.block_tokens, plan.stages) == (128, 2)
    with pytest.raises(ValueError, match="block_pages: pages of 16 tokens must make 64, 128 or 256, not 3 of them"):
        gpu.choose_plan(plan_of(), 3, None)
    with pytest.raises(ValueError, match="stages: must be 2 or more, not 1"):
        gpu.choose_plan(plan_of(), None, 1)
