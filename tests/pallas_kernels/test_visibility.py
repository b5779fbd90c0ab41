"""Blocks left out are never needed, and blocks taken are seldom needless."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_partial.visibility import block_lists, extents, may_see, sees_all
from tests.pallas_kernels import cases


@partial(jax.jit, static_argnums=2)
def judged(q, kv, window):
    return may_see(extents(*q), extents(*kv), window), sees_all(extents(*q), extents(*kv), window)


def seen_blocks(q, kv, block, window=None):
    """Pairs of blocks of `block` tokens: (computed, with something visible, computed unmasked, with nothing hidden)."""
    q, kv = (tuple(jnp.asarray(a, jnp.int32).reshape(-1, block) for a in side) for side in (q, kv))
    seen, unmasked = (np.asarray(a) for a in judged(q, kv, window))
    (q_req, q_pos), (kv_req, kv_pos) = ([a[:, None, :, None] for a in q], [a[None, :, None, :] for a in kv])
    visible = (q_req == kv_req) & (kv_req >= 0) & (kv_pos <= q_pos) & (q_pos - kv_pos < (window or 2**30))
    needed = np.asarray(visible.any(axis=(2, 3)))
    whole = np.asarray(visible.all(axis=(2, 3)))
    assert not (needed & ~seen).any(), "a visible block would be skipped"
    assert not (unmasked & ~whole).any(), "a hidden key would be seen"
    return seen.sum(), needed.sum(), unmasked.sum(), whole.sum()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("layout", [cases.causal, cases.chunk, cases.striped, cases.ragged, cases.all_padding])
def test_only_visible_blocks_are_computed(layout, window):
    q_req, q_pos, kv_req, kv_pos = layout(np.random.default_rng(0), 512, 512)
    computed, needed, unmasked, whole = seen_blocks((q_req, q_pos), (kv_req, kv_pos), 16, window)
    assert computed <= 1.05 * needed
    assert unmasked == whole


def test_blocks_of_one_token_are_judged_exactly():
    for layout in (cases.causal, cases.ragged, cases.scattered):
        q_req, q_pos, kv_req, kv_pos = layout(np.random.default_rng(1), 64, 64)
        for window in (None, 1, 7):
            computed, needed, unmasked, whole = seen_blocks((q_req, q_pos), (kv_req, kv_pos), 1, window)
            assert computed == needed == unmasked == whole


@pytest.mark.parametrize("seed", range(5))
def test_no_visible_block_is_skipped_in_any_order(seed):
    q_req, q_pos, kv_req, kv_pos = cases.scattered(np.random.default_rng(seed), 64, 64)
    q_req, kv_req = np.sort(q_req), np.roll(np.sort(kv_req), seed)
    for window in (None, 9):
        seen_blocks((q_req, q_pos), (kv_req, kv_pos), 4, window)


def test_block_lists_name_the_seen_blocks():
    seen = np.random.default_rng(0).random((7, 9)) < 0.4
    lists, counts = block_lists(jnp.asarray(seen))
    for row in range(7):
        np.testing.assert_array_equal(lists[row, : counts[row]], np.flatnonzero(seen[row]))
