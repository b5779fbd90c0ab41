"""Loading: the right shards on the right devices, and little host memory."""

import tracemalloc

import jax
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from loong_jax.config import ModelConfig
from loong_jax.model import checkpoint, leaves
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import init_params, param_structs
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import read_config
from loong_jax.model.safetensors_reader import SINGLE_FILE
from tests.support.fixtures import FAMILY_NAMES, NAMES, model_directory

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)


@pytest.fixture
def directory(tmp_path):
    save_checkpoint(tmp_path, CONFIG, init_params(CONFIG, 0))
    return tmp_path


def load(directory, config=CONFIG, tp=1, stacked=False, **options):
    return load_checkpoint(directory, config, tp=tp, devices=[jax.devices()[:tp]], stacked=stacked, **options)


def test_export_and_config_are_inverse(directory):
    assert read_config(directory) == CONFIG
    loaded = load(directory)[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), loaded, init_params(CONFIG, 0))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_equal_slices_cut_by_hand(directory, tp, stacked):
    tensors = load_file(directory / SINGLE_FILE)
    devices = [jax.devices()[4 * i : 4 * i + tp] for i in range(3)]
    devices[1] = [None, *devices[1][1:]]  # not on this host
    loaded = load_checkpoint(directory, CONFIG, tp=tp, devices=devices, stacked=stacked)
    structs = param_structs(CONFIG, tp, stacked=stacked)
    rows = -(-101 // tp)
    for instance, rank in ((i, r) for i in range(3) for r in range(tp)):
        tree = loaded[instance][rank]
        if devices[instance][rank] is None:
            assert tree is None
            continue
        for leaf, struct in zip(jax.tree.leaves(tree), jax.tree.leaves(structs), strict=True):
            assert leaf.devices() == {devices[instance][rank]}
            assert (leaf.shape, leaf.dtype) == ((1, *struct.shape[1:]), struct.dtype)
        of_layer = lambda name, tree=tree: tree["layers"][name][0, 1] if stacked else tree["layers"][1][name][0]
        tensor = lambda name: tensors[f"model.layers.1.{name}.weight"]
        kv = rank * 2 // tp
        num_kv = max(1, 2 // tp)
        parts = [
            tensor("self_attn.q_proj")[rank * 64 // tp : (rank + 1) * 64 // tp],
            tensor("self_attn.k_proj")[kv * 16 : (kv + num_kv) * 16],
            tensor("self_attn.v_proj")[kv * 16 : (kv + num_kv) * 16],
        ]
        np.testing.assert_array_equal(of_layer("qkv"), np.concatenate(parts).T)
        ff = slice(rank * 96 // tp, (rank + 1) * 96 // tp)
        gate_up = np.concatenate([tensor("mlp.gate_proj")[ff], tensor("mlp.up_proj")[ff]])
        np.testing.assert_array_equal(of_layer("gate_up"), gate_up.T)
        np.testing.assert_array_equal(of_layer("down"), tensor("mlp.down_proj")[:, ff].T)
        heads = slice(rank * 64 // tp, (rank + 1) * 64 // tp)
        np.testing.assert_array_equal(of_layer("o"), tensor("self_attn.o_proj")[:, heads].T)
        padded = np.pad(tensors["lm_head.weight"], ((0, rows * tp - 101), (0, 0)))
        np.testing.assert_array_equal(tree["lm_head"][0], padded[rank * rows : (rank + 1) * rows])
        np.testing.assert_array_equal(tree["final_norm"][0], tensors["model.norm.weight"])


@pytest.mark.parametrize("name", NAMES + FAMILY_NAMES)
def test_every_fixture_loads(name):
    config = read_config(model_directory(name))
    loaded = load(model_directory(name), config, tp=2)
    structs = param_structs(config, 2, stacked=False)
    assert jax.tree.structure(loaded[0][1]) == jax.tree.structure(structs)


def test_host_memory_stays_at_two_leaves(tmp_path):
    """The leaf being read and the one before it, and for each thread a block as read and as checked."""
    config = msgspec.structs.replace(CONFIG, num_layers=5, hidden_size=1024, intermediate_size=4096)
    save_checkpoint(tmp_path, config, init_params(config, 0))
    model_bytes = (tmp_path / SINGLE_FILE).stat().st_size
    leaves_bytes = 1024 * 3 * 4096 * 4  # gate_up and down, the largest neighbours
    blocks_bytes = 2 * checkpoint._NUM_THREADS * leaves._BLOCK_ELEMENTS * 4
    load(tmp_path, config, stacked=True)  # imports and compilations do not count
    tracemalloc.start()
    try:
        load(tmp_path, config, stacked=True)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model_bytes > 3 * (leaves_bytes + blocks_bytes)
    assert peak_bytes < leaves_bytes + blocks_bytes + (1 << 20)


def test_progress_ends_at_all_bytes(directory):
    calls = []
    load(directory, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == sum(t.nbytes for t in load_file(directory / SINGLE_FILE).values())
