"""The plan of slices: every element of every tensor belongs to some rank, and to one only unless replicated."""

import msgspec
import numpy as np
import pytest

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import param_structs
from loong_jax.model.leaves import Leaf, Piece, leaves_of

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_cover_every_tensor(tp, tied):
    config = msgspec.structs.replace(CONFIG, tie_embeddings=tied)
    covered = {}
    for rank in range(tp):
        for leaf in leaves_of(config, tp, rank):
            for piece in leaf.pieces:
                counts = covered.setdefault(piece.name, np.zeros(piece.shape, int))
                counts[(slice(None),) * piece.axis + (slice(piece.start, piece.stop),)] += 1
    replicas = {name: {1} for name in covered}
    replicas |= {name: {tp} for name in covered if "norm" in name}
    if tp == 4:  # more ranks than KV heads
        replicas |= {name: {2} for name in covered if "k_proj" in name or "v_proj" in name}
    assert {name: set(counts.flat) for name, counts in covered.items()} == replicas
    assert ("lm_head.weight" in covered) != tied


@pytest.mark.parametrize("tp", [1, 2])
def test_the_paths_are_those_of_the_parameters(tp):
    structs = param_structs(CONFIG, tp, stacked=False)
    paths = [leaf.path for leaf in leaves_of(CONFIG, tp, 0)]
    assert len(paths) == len(set(paths)) == 3 + 6 * CONFIG.num_layers
    for path in paths:
        value = structs
        for key in path:
            value = value[key]
        assert value.shape[0] == tp


def test_pieces_lie_side_by_side_and_the_rest_is_zero():
    tensors = FakeTensors({"a": (4, 3), "b": (2, 3)})
    pieces = (Piece("a", (4, 3), 0, 1, 3), Piece("b", (2, 3), 0, 0, 2))
    fused = Leaf(("qkv",), pieces, True).read(tensors, (3, 4), np.dtype(np.float32))
    np.testing.assert_array_equal(fused.T, [[3, 4, 5], [6, 7, 8], [0, 1, 2], [3, 4, 5]])
    padded = Leaf(("embed",), (pieces[1],), False).read(tensors, (3, 3), np.dtype(np.float32))
    np.testing.assert_array_equal(padded, [[0, 1, 2], [3, 4, 5], [0, 0, 0]])
