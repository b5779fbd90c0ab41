"""Safetensors: what is read, and refusals that name file and tensor, before anything is placed."""

import contextlib
import json
import struct

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from loong_jax.config import ModelConfig
from loong_jax.model import safetensors_reader
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import CheckpointError
from loong_jax.model.safetensors_reader import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, SafetensorsReader

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
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: is truncated"):
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


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', "[]", '{"weight_map": {"a": 1}}'])
def test_broken_index(directory, index):
    (directory / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: (weight_map|is no JSON)"):
        load(directory)


def test_index_that_names_a_file_without_the_tensor(directory):
    names = load_file(directory / SINGLE_FILE)
    save_file({"other": np.zeros(1, np.float32)}, directory / "other.safetensors")
    weight_map = {name: "other.safetensors" if name == K_PROJ else SINGLE_FILE for name in names}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"other\.safetensors: {K_PROJ}: tensor is missing"):
        load(directory)


def write_raw(path, header, data=b"", header_bytes=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)


def entry(start, stop, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b: data_offsets: overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b: data_offsets: overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "b: data_offsets: leaves a hole of 4 bytes"),
        ({"a": entry(4, 8)}, 8, "a: data_offsets: leaves a hole of 4 bytes"),
        ({"a": entry(0, 8)}, 4, "is truncated"),
        ({"a": entry(0, 8)}, 12, "holds more than its tensors"),
        ({"a": entry(0, 8, shape=[3])}, 8, "'a': data_offsets: 8 bytes do not hold F32"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "'a': shape: "),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "'a': shape: "),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "'a': shape: "),
        ({"a": entry(0, 8, shape="2")}, 8, "'a': shape: "),
        ({"a": entry(0, 8, shape=[2**62, 2**62, 4])}, 8, "'a': shape: "),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, "'a': data_offsets: "),
        ({"a": entry(0, 8, shape=[1] * 100)}, 8, "'a': shape: "),
        ({"a": entry(0, 8, dtype="F31")}, 8, "'a': dtype: 'F31' is not known"),
        ({"a": entry(0, 8, dtype=[])}, 8, "'a': dtype: "),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "'a': data_offsets: "),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "'a': data_offsets: "),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "'a': data_offsets: "),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a': is not described by"),
        ({"a": entry(0, 8) | {"file": "/etc/passwd"}}, 8, "'a': is not described by"),
        ({"a": 5}, 0, "'a': is not described by"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": 1}', 4, "header: 'a': is there twice"),
        ({"a" * 10_000: entry(0, 8)}, 8, "header: 'aaa.*: is too long a name"),
        (b"[1]", 0, "header: is no JSON object"),
        (b'{"a": \xff}', 0, "header: is no JSON"),
        (b'{"a": ' * 100_000, 0, "header: is no JSON: nested too deeply"),
    ],
)
def test_broken_headers_are_refused_by_file_and_tensor(tmp_path, header, num_bytes, words):
    write_raw(tmp_path / SINGLE_FILE, header, bytes(num_bytes))
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: {words}"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    ("header_bytes", "words"),
    [
        (10**9, f"header: 1000000000 bytes are more than the limit of {MAX_HEADER_BYTES}"),
        (2**64 - 1, "header: 18446744073709551615 bytes are more than the limit"),
        (10_000, "is truncated or no safetensors file"),
        (10, "header: is no JSON"),
        (0, "header: is no JSON"),
    ],
)
def test_a_header_length_that_lies(tmp_path, header_bytes, words):
    write_raw(tmp_path / SINGLE_FILE, {"a": entry(0, 8)}, bytes(8), header_bytes)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: {words}"):
        SafetensorsReader(tmp_path)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path):
    """Sparse, so that the file really has the bytes its header speaks of."""
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(2 * 10**9)
    with pytest.raises(CheckpointError, match="header: 1000000000 bytes"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors"])
def test_an_index_that_leaves_the_folder(directory, file):
    save_file({"other": np.zeros(1, np.float32)}, directory.parent / "other.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"other": file}}))
    with pytest.raises(CheckpointError, match="is no plain file name"):
        load(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json", 7, None, ["a.safetensors"]])
def test_an_index_that_names_other_files(directory, file):
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"other": file}}))
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE}: weight_map\.other: .* is no safetensors file"):
        load(directory)


def test_a_link_out_of_the_folder(directory, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / SINGLE_FILE
    (directory / SINGLE_FILE).rename(outside)
    (directory / SINGLE_FILE).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: is a link out of the folder"):
        load(directory)


def test_a_tensor_in_two_files(directory):
    names = sorted(load_file(directory / SINGLE_FILE))
    save_file({"z": np.zeros(1, np.float32), names[0]: np.zeros(1, np.float32)}, directory / "z.safetensors")
    weight_map = dict.fromkeys(names, SINGLE_FILE) | {"z": "z.safetensors"}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"{names[0]}: is also in "):
        load(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [K_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(directory, name, value):
    rewrite(directory, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value))
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: {name}: holds NaN or infinite values"):
        load(directory)


def test_slices(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    save_file({"a": array, "b": np.zeros((0, 3), np.float32)}, tmp_path / SINGLE_FILE)
    with SafetensorsReader(tmp_path) as tensors:
        assert tensors.check("a", (5, 4, 3), "float32") == 240
        for index in [(slice(None),), (slice(1, 3),), (slice(None), slice(2, 4)), (slice(4, 9), slice(1, 2), slice(0))]:
            np.testing.assert_array_equal(tensors.read("a", index), array[index])
        assert tensors.read("b", (slice(None),)).shape == (0, 3)


def test_wide_rows_are_read_in_part(tmp_path, monkeypatch):
    array = np.arange(7 * 4096, dtype=np.float32).reshape(7, 4096)
    save_file({"a": array}, tmp_path / SINGLE_FILE)
    with SafetensorsReader(tmp_path) as tensors:
        read = []
        plain = safetensors_reader.read_exactly
        monkeypatch.setattr(
            safetensors_reader,
            "read_exactly",
            lambda path, fd, out, at: (read.append(len(out)), plain(path, fd, out, at)),
        )
        for cut in (slice(0, 2048), slice(2048, 4096), slice(1, 1025), slice(0, 4095), slice(5, 6), slice(7, 7)):
            read.clear()
            np.testing.assert_array_equal(tensors.read("a", (slice(2, 6), cut)), array[2:6, cut])
            if cut.stop in (2048, 4096, 1025):
                assert sum(read) == 4 * 4 * (cut.stop - cut.start)


def test_a_file_that_shrinks_while_it_is_read(directory):
    with SafetensorsReader(directory) as tensors:
        tensors.check(K_PROJ, (32, 64), "float32")
        with open(directory / SINGLE_FILE, "r+b") as file:
            file.truncate(2000)
        with pytest.raises(CheckpointError, match="it changed while it was read"):
            tensors.read(K_PROJ, (slice(None),))


def mutated(content, edits):
    content = bytearray(content)
    for where, byte in edits:
        content[where % len(content)] = byte
    return bytes(content)


def check_no_surprise(path, content):
    """A file of any bytes is read or refused; nothing else happens."""
    path.mkdir(exist_ok=True)
    (path / SINGLE_FILE).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        with SafetensorsReader(path) as tensors:
            for name, file in tensors._file_of.items():
                if file.entries[name].dtype in ("F32", "BF16") and file.entries[name].shape:
                    tensors.read(name, (slice(None),))


GOOD = {"a": entry(0, 8), "b": entry(8, 16, shape=[2, 1]), "__metadata__": {"format": "pt"}}


def good_file():
    text = json.dumps(GOOD).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


edits = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4)


@given(edits, st.integers(0, 400))
@settings(max_examples=50)
def test_bytes_changed_at_random(tmp_path_factory, edits, kept):
    check_no_surprise(tmp_path_factory.getbasetemp() / "fuzz", mutated(good_file(), edits)[:kept])


@pytest.mark.slow
@given(
    st.one_of(st.binary(max_size=200), st.builds(lambda e, k: mutated(good_file(), e)[:k], edits, st.integers(0, 400)))
)
@settings(max_examples=5000)
def test_bytes_changed_at_random_for_longer(tmp_path_factory, content):
    check_no_surprise(tmp_path_factory.getbasetemp() / "fuzz", content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values}) | json_values,
    )
)
@settings(max_examples=2000)
def test_headers_of_any_json(tmp_path_factory, header):
    text = json.dumps(header).encode()
    check_no_surprise(tmp_path_factory.getbasetemp() / "fuzz", struct.pack("<Q", len(text)) + text + bytes(16))
