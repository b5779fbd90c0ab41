"""Shapes and storage of the state on devices, and deltas of the page table."""

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.kv_pool import apply_deltas, pool_bytes, pool_dim, state_structs, storage_dtype

MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=80,
    max_position=64,
)
BF16 = msgspec.structs.replace(MODEL, dtype="bfloat16")


def cluster(tp: int) -> ClusterConfig:
    ladder = LadderConfig(dops=(1, 2), prefill_tokens=(16,))
    return ClusterConfig(
        num_instances=2, tp=tp, pages_per_instance=10, page_tokens=4, ring_tokens=8, query_tile_tokens=8, slots=6,
        ladder=ladder,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "model", "dtype"),
    [
        ("cpu", MODEL, jnp.float32),
        ("cpu", BF16, jnp.uint16),
        ("tpu", MODEL, jnp.float32),
        ("tpu", BF16, jnp.bfloat16),
        ("gpu", BF16, jnp.bfloat16),
    ],
)
def test_storage_dtype(platform, model, dtype):
    assert storage_dtype(model, platform) == dtype
    assert state_structs(model, cluster(1), 2, platform).kv.dtype == dtype


@pytest.mark.parametrize(("platform", "head_dim", "expected"), [("tpu", 64, 128), ("tpu", 128, 128), ("tpu", 160, 256),
                                                                ("cpu", 80, 80), ("gpu", 80, 128),
                                                                ("gpu", 64, 64)])  # fmt: skip
def test_heads_are_padded_to_what_kernels_take(platform, head_dim, expected):
    assert pool_dim(msgspec.structs.replace(MODEL, head_dim=head_dim), platform) == expected


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_shapes(tp, kv_heads):
    """Where tp exceeds the KV heads each rank keeps one, and they are replicated."""
    state = state_structs(MODEL, cluster(tp), 2, "tpu")
    assert state.kv.shape == (2, tp, 3, 10, 2, kv_heads, 4, 128)
    assert state.table.shape == (2, tp, cluster(tp).table_entries, 3)
    assert state.tokens.shape == (2, tp, 6)
    assert state.table.dtype == state.tokens.dtype == jnp.int32


def test_bytes_of_an_instance():
    """All devices of the instance, whatever the size of a group."""
    assert pool_bytes(MODEL, cluster(1), "cpu") == 3 * 10 * 2 * 4 * 4 * 80 * 4
    assert pool_bytes(BF16, cluster(8), "tpu") == 8 * 3 * 10 * 2 * 1 * 4 * 128 * 2


def test_deltas_out_of_range_drop():
    table = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    deltas = jnp.array([[2, 7, 8, 9], [4, 1, 1, 1], [0, 5, 5, 5], [4, 2, 2, 2]], jnp.int32)
    expected = np.array([[5, 5, 5], [3, 4, 5], [7, 8, 9], [9, 10, 11]])
    assert (np.asarray(apply_deltas(table, deltas)) == expected).all()
