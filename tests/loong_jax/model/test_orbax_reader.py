"""The folder that loong convert made: slices, and refusals of one that was tampered with."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from loong_jax.config import ModelConfig
from loong_jax.model import convert as conversion
from loong_jax.model import orbax_reader
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import CheckpointError
from loong_jax.model.orbax_reader import OrbaxReader, is_orbax
from loong_jax.model.safetensors_reader import SINGLE_FILE

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(folder / "hf", CONFIG, init_params(CONFIG, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_MIN_CHUNK_BYTES", 1024)
        conversion.convert(folder / "hf", folder / "out")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to tamper with."""
    import shutil

    return shutil.copytree(made / "out", tmp_path / "out")


def test_slices(made):
    assert is_orbax(made / "out")
    assert not is_orbax(made / "hf")
    expected = load_file(made / "hf" / SINGLE_FILE)
    with OrbaxReader(made / "out") as tensors:
        for name in (DOWN, EMBED):
            array = expected[name]
            assert tensors.check(name, array.shape, "float32") == array.nbytes
            for index in [
                (slice(None),),
                (slice(3, 40),),
                (slice(None), slice(17, 18)),
                (slice(1, 2), slice(5, 60)),
                (slice(63, 64), slice(0, 96)),
                (slice(5, 5),),
            ]:
                np.testing.assert_array_equal(tensors.read(name, index), array[index])
        name = "model.norm.weight"
        tensors.check(name, (64,), "float32")
        np.testing.assert_array_equal(tensors.read(name, (slice(3, 9),)), expected[name][3:9])
    assert len(list((made / "out" / "weights" / DOWN).glob("*.*"))) > 10, "several chunks, or nothing is tested"


def test_only_the_chunks_of_the_slice_are_read(made, monkeypatch):
    """A rank of four reads a quarter of each tensor."""
    read = []
    read_exactly = orbax_reader.read_exactly
    monkeypatch.setattr(
        orbax_reader, "read_exactly", lambda path, fd, out, at: (read.append(len(out)), read_exactly(path, fd, out, at))
    )
    with OrbaxReader(made / "out") as tensors:
        for name, shape, index in [
            (DOWN, (64, 96), (slice(None), slice(24, 48))),
            (EMBED, (101, 64), (slice(26, 52),)),
        ]:
            tensors.check(name, shape, "float32")
            read.clear()
            block = tensors.read(name, index)
            assert sum(read) == block.nbytes


def change_json(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def zarray(**fields):
    return lambda folder: change_json(folder / "weights" / DOWN / ".zarray", **fields)


def metadata(**fields):
    return lambda folder: change_json(folder / "weights" / "_METADATA", **fields)


def chunk(change):
    return lambda folder: change(folder / "weights" / DOWN / "0.3")


def resize(num_bytes):
    return chunk(lambda path: path.write_bytes(path.read_bytes()[:num_bytes].ljust(num_bytes, b"\0")))


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def replaced_by_link(folder):
    array = folder / "weights" / DOWN
    array.rename(folder / "elsewhere")
    array.symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda f: (f / "weights" / "_METADATA").unlink(), "_METADATA: file is missing"),
        (lambda f: (f / "weights" / "_METADATA").write_text("{"), "_METADATA: is no JSON"),
        (metadata(use_ocdbt=True), "_METADATA: use_ocdbt: True is not what"),
        (metadata(use_zarr3=True), "_METADATA: use_zarr3: True is not what"),
        (metadata(use_ocdbt="absent"), "_METADATA: use_ocdbt: None is not what"),
        (lambda f: (f / "weights" / DOWN).rename(f / "gone"), f"{DOWN}: tensor is missing"),
        (replaced_by_link, f"{DOWN}: is no folder"),
        (lambda f: (f / "weights" / DOWN / ".zarray").unlink(), r"\.zarray: file is missing"),
        (lambda f: (f / "weights" / DOWN / ".zarray").write_bytes(b"\xff"), r"\.zarray: is no JSON"),
        (zarray(shape=[64, 95]), rf"{DOWN}: has shape \[64, 95\], not \[64, 96\]"),
        (zarray(shape=[-64, 96]), r"\.zarray: shape: "),
        (zarray(shape="64"), r"\.zarray: shape: "),
        (zarray(shape=[]), r"\.zarray: shape: "),
        (zarray(shape=[2**47, 96]), r"\.zarray: chunks: .* are more than"),
        (zarray(chunks=[0, 4]), r"\.zarray: chunks: "),
        (zarray(chunks=[64]), r"\.zarray: chunks: "),
        (zarray(chunks=[64, 7.5]), r"\.zarray: chunks: "),
        (zarray(chunks=[2**47, 2**47]), "0.0: is truncated or no chunk"),
        (zarray(dtype="<f8"), r"\.zarray: dtype: '<f8' is not supported"),
        (zarray(dtype="|O"), r"\.zarray: dtype: '|O' is not supported"),
        (zarray(dtype="bfloat16"), f"{DOWN}: has dtype bfloat16, not float32"),
        (zarray(compressor={"id": "zstd"}), r"\.zarray: compressor: "),
        (zarray(filters=[{"id": "pickle"}]), r"\.zarray: filters: "),
        (zarray(order="F"), r"\.zarray: order: 'F'"),
        (zarray(dimension_separator="/"), r"\.zarray: dimension_separator: "),
        (zarray(zarr_format=3), r"\.zarray: zarr_format: 3"),
        (resize(10), r"0\.3: is truncated or no chunk"),
        (resize(100_000), r"0\.3: is truncated or no chunk"),
        (chunk(lambda path: path.unlink()), r"0\.3: file is missing"),
        (chunk(lambda path: link(path, "/etc/hostname")), r"0\.3: is a link out of the folder"),
        (chunk(lambda path: link(path, "../../config.json")), r"0\.3: is a link out of the folder"),
        (chunk(lambda path: (path.unlink(), path.mkdir())), r"0\.3: is no regular file"),
    ],
)
def test_a_folder_that_was_tampered_with(folder, tamper, words):
    tamper(folder)
    placed = []
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(
            folder,
            CONFIG,
            tp=1,
            devices=[jax.devices()[:1]],
            stacked=False,
            progress=lambda *call: placed.append(call),
        )
    assert not placed, "refused before anything is placed"


def test_weights_that_are_no_numbers(folder):
    path = folder / "weights" / DOWN / "0.3"
    path.write_bytes(np.float32(np.inf).tobytes() + path.read_bytes()[4:])
    with pytest.raises(CheckpointError, match=f"weights: {DOWN}: holds NaN or infinite values"):
        load_checkpoint(folder, CONFIG, tp=1, devices=[jax.devices()[:1]], stacked=False)


def test_a_weights_link(folder, tmp_path):
    (folder / "weights").rename(tmp_path / "weights")
    (folder / "weights").symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights: is no folder"):
        OrbaxReader(folder)
