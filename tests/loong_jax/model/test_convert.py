"""loong convert: the same weights for any number of instances of any tp, readable by Orbax, whole or not at all."""

import os
import signal
import subprocess
import sys
import tracemalloc

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from loong_jax.config import ConfigError, ModelConfig
from loong_jax.model import convert as conversion
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.convert import convert
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.hf_config import CheckpointError, read_config
from loong_jax.model.safetensors_reader import SINGLE_FILE
from serving.tokenizer import Tokenizer
from tests.support.fixtures import model_directory
from tests.support.tiny_checkpoint import make_tiny_checkpoint

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of tests are cut as those of large models are."""
    monkeypatch.setattr(conversion, "_MIN_CHUNK_BYTES", 1024)


def load(directory, config, tp, devices=None):
    devices = devices or [jax.devices()[:tp], jax.devices()[tp : 2 * tp]]
    return load_checkpoint(directory, config, tp=tp, devices=devices, stacked=False)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("changes", "num_files"),
    [({}, 1), ({"tie_embeddings": True}, 1), ({"dtype": "bfloat16"}, 3), ({"intermediate_size": 92}, 1)],
    ids=str,
)
def test_every_tp_loads_the_same_from_both_forms(tmp_path, changes, num_files):
    config = msgspec.structs.replace(CONFIG, **changes)
    save_checkpoint(tmp_path / "hf", config, init_params(config, 0), num_files=num_files)
    convert(tmp_path / "hf", tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    for tp in (1, 2, 4):
        assert_same(load(tmp_path / "hf", config, tp), load(tmp_path / "out", config, tp))
    # A host that holds some ranks only.
    some = [[None, jax.devices()[1]], [jax.devices()[2], None]]
    assert_same(load(tmp_path / "hf", config, 2, some), load(tmp_path / "out", config, 2, some))


@pytest.mark.parametrize("name", ["gqa", "bf16"])
def test_orbax_itself_restores_it(tmp_path, name):
    source = model_directory(name)
    convert(source, tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "out" / "weights").resolve())
    if name == "gqa":
        expected = load_file(source / SINGLE_FILE)
        assert set(restored) == set(expected)
        assert all(np.array_equal(restored[key], expected[key]) for key in expected)
    else:
        assert {str(value.dtype) for value in restored.values()} == {"bfloat16"}
    assert_same(load(source, read_config(source), 2), load(tmp_path / "out", read_config(source), 2))


def test_tokenizer_and_configuration_come_along(tmp_path):
    make_tiny_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    (tmp_path / "hf" / "notes.txt").write_text("not part of a checkpoint")
    convert(tmp_path / "hf", tmp_path / "deep" / "er" / "out")
    out = tmp_path / "deep" / "er" / "out"
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "weights"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"
    tokenizer = Tokenizer.load(out)
    assert tokenizer is not None
    assert tokenizer.has_chat_template


def test_only_where_nothing_is(tmp_path):
    save_checkpoint(tmp_path / "hf", CONFIG, init_params(CONFIG, 0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "empty").mkdir()
    for out in ("full", "file", "link", "hf"):
        with pytest.raises(ConfigError, match=f"{out} is there already"):
            convert(tmp_path / "hf", tmp_path / out)
    convert(tmp_path / "hf", tmp_path / "empty")
    with pytest.raises(ConfigError, match="is converted already"):
        convert(tmp_path / "empty", tmp_path / "again")


def test_a_failed_conversion_leaves_nothing(tmp_path):
    save_checkpoint(tmp_path / "hf", CONFIG, init_params(CONFIG, 0))
    calls = []

    def fail(done, total):
        calls.append((done, total))
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(tmp_path / "hf", tmp_path / "out", progress=lambda *call: calls.append(call))
    num_bytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "hf" / SINGLE_FILE).values())
    assert calls[-1] == (num_bytes, num_bytes)
    assert calls[5:] == sorted(calls[5:])


def test_a_killed_conversion_leaves_nothing_that_serves(tmp_path):
    save_checkpoint(tmp_path / "hf", CONFIG, init_params(CONFIG, 0))
    program = (
        "import os, signal, sys; from loong_jax.model.convert import convert\n"
        "def kill(done, total):\n    if done * 2 > total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], sys.argv[2], progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "hf", tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name != "hf"]
    for folder, _, files in os.walk(left):
        assert "config.json" not in files, folder
    convert(tmp_path / "hf", tmp_path / "out")
    assert read_config(tmp_path / "out") == CONFIG


def test_a_bad_source_is_refused_before_anything_is_written(tmp_path):
    save_checkpoint(tmp_path / "hf", CONFIG, init_params(CONFIG, 0))
    content = (tmp_path / "hf" / SINGLE_FILE).read_bytes()
    (tmp_path / "hf" / SINGLE_FILE).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="is truncated"):
        convert(tmp_path / "hf", tmp_path / "out")
    (tmp_path / "hf" / SINGLE_FILE).write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match="holds NaN"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    config = msgspec.structs.replace(CONFIG, num_layers=12, hidden_size=256, intermediate_size=512)
    save_checkpoint(tmp_path / "hf", config, init_params(config, 0))
    convert(tmp_path / "hf", tmp_path / "warm")  # imports do not count
    tracemalloc.start()
    try:
        convert(tmp_path / "hf", tmp_path / "out")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest_bytes = 256 * 512 * 4
    assert peak_bytes < 4 * largest_bytes < (tmp_path / "hf" / SINGLE_FILE).stat().st_size / 10
