"""Safetensors: what is read, and refusals that name file and tensor, before anything is placed."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loong_jax.config import ModelConfig
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import CheckpointError
from loong_jax.model.safetensors_reader import INDEX_FILE, SINGLE_FILE

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)


@pytest.fixture
def directory(tmp_path):
    save_checkpoint(tmp_path, CONFIG, init_params(CONFIG, 0))
    return tmp_path


def load(directory):
    return load_checkpoint(directory, CONFIG, tp=1, devices=[jax.devices()[:1]], stacked=False)


def rewrite(directory, change):
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_PROJ), f"{K_PROJ}: tensor is missing"),
        (lambda t: t.update({K_PROJ: t[K_PROJ][:-1]}), rf"{K_PROJ}: has shape \[31, 64\], not \[32, 64\]"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.float16)}), f"{K_PROJ}: has dtype F16, not F32"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight: tensor is missing"),
    ],
)
def test_wrong_tensors_are_refused_by_name(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(directory)
    assert str(directory) in str(refusal.value)


@pytest.mark.parametrize("kept_bytes", [0, 5, 200, -10])
def test_truncated_file_is_refused(directory, kept_bytes):
    path = directory / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: is truncated or no safetensors file"):
        load(directory)


def test_bin_weights_are_refused(directory):
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only \.bin weights"):
        load(directory)


def test_no_weights_at_all(directory):
    (directory / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: file is missing"):
        load(directory)


def test_sharded_files(tmp_path):
    save_checkpoint(tmp_path, CONFIG, init_params(CONFIG, 0), num_files=3)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    loaded = load(tmp_path)[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), loaded, init_params(CONFIG, 0))

    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: file is missing"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', "[]"])
def test_broken_index(directory, index):
    (directory / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: weight_map"):
        load(directory)


def test_index_that_names_a_file_without_the_tensor(directory):
    names = load_file(directory / SINGLE_FILE)
    save_file({"other": np.zeros(1, np.float32)}, directory / "other.safetensors")
    weight_map = {name: "other.safetensors" if name == K_PROJ else SINGLE_FILE for name in names}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"other\.safetensors: {K_PROJ}: tensor is missing"):
        load(directory)
