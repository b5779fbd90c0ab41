"""The plan of slices: every element of every tensor belongs to some rank, and to one only unless replicated."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import param_structs
from loong_jax.model.leaves import Leaf, Piece, _write_transposed, all_finite, leaves_of

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)


class FakeTensors:
    """Each tensor counts its elements from 0."""

    def __init__(self, shapes):
        self.shapes = shapes

    def where(self, name):
        return f"file: {name}"

    def check(self, name, shape, dtype):
        return 4 * int(np.prod(shape))

    def read(self, name, index):
        shape = self.shapes[name]
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)[index]


BIASED = msgspec.structs.replace(CONFIG, family="qwen3", qkv_bias=True, o_bias=True)
GEMMA3 = msgspec.structs.replace(CONFIG, family="gemma3_text")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("config", [CONFIG, BIASED, GEMMA3], ids=lambda config: config.family)
def test_ranks_cover_every_tensor(config, tp, tied):
    config = msgspec.structs.replace(config, tie_embeddings=tied)
    covered = {}
    for rank in range(tp):
        for leaf in leaves_of(config, tp, rank):
            for piece in leaf.pieces:
                counts = covered.setdefault(piece.name, np.zeros(piece.shape, int))
                counts[(slice(None),) * piece.axis + (slice(piece.start, piece.stop),)] += 1
    replicas = {name: {1} for name in covered}
    replicas |= {name: {tp} for name in covered if "norm" in name or name.endswith("o_proj.bias")}
    if tp == 4:  # more ranks than KV heads
        replicas |= {name: {2} for name in covered if "k_proj" in name or "v_proj" in name}
    assert {name: set(counts.flat) for name, counts in covered.items()} == replicas
    assert ("lm_head.weight" in covered) != tied


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("config", "per_layer"), [(CONFIG, 6), (BIASED, 10), (GEMMA3, 10)], ids=("llama", "qwen3", "gemma3")
)
def test_the_paths_are_those_of_the_parameters(config, per_layer, tp):
    structs = param_structs(config, tp, stacked=False)
    paths = [leaf.path for leaf in leaves_of(config, tp, 0)]
    assert len(paths) == len(set(paths)) == 3 + per_layer * config.num_layers
    assert len(jax.tree.leaves(structs)) == len(paths)
    for path in paths:
        value = structs
        for key in path:
            value = value[key]
        assert value.shape[0] == tp


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (100, 3), (64, 64), (37, 129)])
def test_transposed_writes(shape, dtype):
    block = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    out = np.zeros((shape[1], shape[0] + 2), dtype)
    _write_transposed(out[:, 1:-1], block)
    np.testing.assert_array_equal(out[:, 1:-1], block.T)
    assert not out[:, [0, -1]].any()


def test_on_cpu_instances_share_a_leaf_without_a_copy():
    leaf = Leaf(("embed",), (Piece("a", (300, 7), 0, 0, 300),), False)
    host = leaf.read(FakeTensors({"a": (300, 7)}), (301, 7), np.dtype(np.float32))
    placed = [jax.device_put(host[None], device) for device in jax.devices()[:2]]
    assert {value.unsafe_buffer_pointer() for value in placed} == {host.ctypes.data}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_all_finite(dtype):
    block = np.array([[0.0, -1.5, 3e38, -3e38, 1e-45]], dtype)
    assert all_finite(block)
    assert all_finite(block[:, :0])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bad = block.copy()
        bad[0, 2] = value
        assert not all_finite(bad)
        assert not all_finite(bad[:, 1:4]), "a slice of rows"


def test_pieces_lie_side_by_side_and_the_rest_is_zero():
    tensors = FakeTensors({"a": (4, 3), "b": (2, 3)})
    pieces = (Piece("a", (4, 3), 0, 1, 3), Piece("b", (2, 3), 0, 0, 2))
    fused = Leaf(("qkv",), pieces, True).read(tensors, (3, 4), np.dtype(np.float32))
    np.testing.assert_array_equal(fused.T, [[3, 4, 5], [6, 7, 8], [0, 1, 2], [3, 4, 5]])
    padded = Leaf(("embed",), (pieces[1],), False).read(tensors, (3, 3), np.dtype(np.float32))
    np.testing.assert_array_equal(padded, [[0, 1, 2], [3, 4, 5], [0, 0, 0]])
