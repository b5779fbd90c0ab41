"""What is the GPU kernel's own in `flash_partial`: the lists of its work, and its sizes.

That it is right is `test_conformance.py`, its barriers `test_gpu_races.py`, that it compiles `test_gpu_compile.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_partial import gpu
from pallas_kernels.flash_partial.visibility import extents, may_see, sees_all
from pallas_kernels.hopper import SMEM_LIMIT_BYTES
from tests.pallas_kernels import cases


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("layout", [cases.striped, cases.scattered])
def test_each_query_block_visits_what_it_may_see_once_and_whole_blocks_first(layout, window):
    sides = [jnp.asarray(a.reshape(-1, 16), jnp.int32) for a in layout(np.random.default_rng(3), 512, 768)]
    q, kv = extents(*sides[:2]), extents(*sides[2:])
    work = jax.tree.map(np.asarray, jax.jit(lambda: gpu.find_work(q, kv, window))())
    seen, whole = np.asarray(may_see(q, kv, window)), np.asarray(sees_all(q, kv, window))
    for block in range(32):
        visited = work.lists[block, : work.count[block]]
        num_whole = work.whole[block]
        np.testing.assert_array_equal(visited[:num_whole], np.flatnonzero(seen[block] & whole[block]))
        np.testing.assert_array_equal(visited[num_whole:], np.flatnonzero(seen[block] & ~whole[block]))
    assert sorted(work.order) == list(range(32))
    assert (np.diff(work.count[work.order]) <= 0).all(), "the largest start first"


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_sizes_fit_a_multiprocessor(dim: int):
    sizes = gpu.choose_sizes(dim, None, None)
    assert gpu.smem_bytes(sizes, dim) <= SMEM_LIMIT_BYTES
    assert sizes.stages >= 2
    assert sizes.kv == (64 if dim > 128 else 128)


def test_sizes_may_be_given_and_are_checked():
    assert gpu.choose_sizes(128, 64, 2) == (64, 2)
    with pytest.raises(ValueError, match="block_kv: must be 64, 128, 192 or 256, not 100"):
        gpu.choose_sizes(128, 100, None)
    with pytest.raises(ValueError, match="stages: must be 2 or more, not 1"):
        gpu.choose_sizes(128, None, 1)
    with pytest.raises(NotImplementedError, match="shared memory: 256 keys of dim 256"):
        gpu.choose_sizes(256, 256, None)
