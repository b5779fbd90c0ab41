"""The merge law: any split of the keys, in any order and grouping, merges to the attention over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_partial import flash_partial
from pallas_kernels.partial import NEG, Partial, empty, merge, merge_many


def split_attention(seed: int, num_parts: int) -> tuple[Partial, list[Partial]]:
    """Attention over 96 keys, and over each part of a random split (some parts empty)."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((96, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    req, pos = jnp.asarray(np.arange(96) // 40), jnp.asarray(np.arange(96) % 40)
    part_of = jnp.asarray(rng.integers(0, num_parts, 96) // 2 * 2)
    attend = lambda kv_req: flash_partial(q, k, v, req, pos, kv_req, pos, scale=1.0, implementation="reference")
    return attend(req), [attend(jnp.where(part_of == p, req, -1)) for p in range(num_parts)]


def assert_close(got: Partial, want: Partial) -> None:
    np.testing.assert_allclose(got.out, want.out, atol=2e-6)
    np.testing.assert_allclose(got.lse, want.lse, atol=2e-6)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_grouping_gives_the_whole(seed):
    whole, parts = split_attention(seed, 5)
    assert any((p.lse == NEG).all() for p in parts)
    order = np.random.default_rng(seed).permutation(5)
    left = parts[order[0]]
    for i in order[1:]:
        left = merge(left, parts[i])
    assert_close(left, whole)
    assert_close(merge(merge(parts[4], parts[1]), merge(merge(parts[3], parts[0]), parts[2])), whole)
    assert_close(merge_many(jax.tree.map(lambda *a: jnp.stack(a), *parts)), whole)


def test_empty_is_neutral_and_two_empties_stay_empty():
    whole, _ = split_attention(0, 2)
    none = empty(whole.out.shape)
    for merged in (merge(whole, none), merge(none, whole)):
        np.testing.assert_array_equal(merged.out, whole.out)
        np.testing.assert_array_equal(merged.lse, whole.lse)
    for merged in (merge(none, none), merge_many(jax.tree.map(lambda a: jnp.stack([a] * 8), none))):
        assert (merged.out == 0).all()
        assert (merged.lse == np.float32(NEG)).all()


def test_extreme_scores_do_not_overflow():
    out = jnp.ones((1, 1, 4))
    for a, b in ((3e4, -3e4), (1e30, NEG), (-1e30, NEG)):
        merged = merge(Partial(out, jnp.full((1, 1), a)), Partial(-out, jnp.full((1, 1), b)))
        np.testing.assert_array_equal(merged.out, out)
        np.testing.assert_array_equal(merged.lse, np.float32(a))
