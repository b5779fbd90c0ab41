"""Whole hostile folders, loaded in a process with an audit hook: refused by file and field, and nothing was run,
unpickled, connected to, or opened outside the folder."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loong_jax.model.convert import convert
from loong_jax.model.safetensors_reader import INDEX_FILE, SINGLE_FILE
from tests.support.tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]
NORM = "model.norm.weight"
ALLOWED = {"open", "os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob"}


class Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def with_pickles(folder):
    payload = pickle.dumps(Payload(folder.parent / "was_run"))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "weights.npy", "tokenizer.pkl"):
        (folder / name).write_bytes(payload)


def only_pickles(folder):
    with_pickles(folder)
    (folder / SINGLE_FILE).unlink()


def pickle_as_safetensors(folder):
    (folder / SINGLE_FILE).write_bytes(pickle.dumps(Payload(folder.parent / "was_run")))


def with_code(folder):
    for name in ("modeling_evil.py", "conftest.py", "sitecustomize.py", "jax.py"):
        (folder / name).write_text(f"open({str(folder.parent / 'was_run')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder):
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[:-100])


def header(edit):
    def change(folder):
        content = (folder / SINGLE_FILE).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        parsed = json.loads(content[8 : 8 + size])
        text = edit(parsed) or json.dumps(parsed)
        text = text.encode() if isinstance(text, str) else text
        (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return change


def shift(parsed, name, by):
    parsed[name]["data_offsets"] = [offset + by for offset in parsed[name]["data_offsets"]]


def huge_header(folder):
    with open(folder / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(10**9 + 8)


def linked(name, target):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def index(file):
    return lambda folder: (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {NORM: file}}))


def nan(folder):
    tensors = load_file(folder / SINGLE_FILE)
    tensors[NORM][3] = np.nan
    save_file(tensors, folder / SINGLE_FILE)


def config(**fields):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(content))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


HOSTILE = {
    "pickles beside": (with_pickles, "loaded"),
    "only pickles": (only_pickles, "holds only .bin weights"),
    "a pickle by another name": (pickle_as_safetensors, f"{SINGLE_FILE}: "),
    "code beside": (with_code, "loaded"),
    "truncated": (truncated, f"{SINGLE_FILE}: is truncated"),
    "overlap": (header(lambda h: shift(h, NORM, -4)), f"{SINGLE_FILE}: "),
    "hole": (header(lambda h: h.pop(NORM) and None), f"{SINGLE_FILE}: "),
    "shape": (header(lambda h: h[NORM].update(shape=[2**60])), f"{SINGLE_FILE}: '{NORM}': shape: "),
    "negative": (header(lambda h: h[NORM].update(shape=[-64])), f"{SINGLE_FILE}: '{NORM}': shape: "),
    "no JSON": (header(lambda h: b"\xff" * 100), f"{SINGLE_FILE}: header: is no JSON"),
    "header of 1 GB": (huge_header, f"{SINGLE_FILE}: header: 1000000000 bytes"),
    "weights elsewhere": (linked(SINGLE_FILE, "/dev/zero"), f"{SINGLE_FILE}: is a link out of the folder"),
    "config elsewhere": (linked("config.json", "/etc/passwd"), "config.json: is a link out of the folder"),
    "tokenizer elsewhere": (linked("tokenizer.json", "/etc/passwd"), "tokenizer.json: is a link out of the folder"),
    "index up": (index("../x.safetensors"), "'../x.safetensors': is no plain file name"),
    "index absolute": (index("/etc/x.safetensors"), "'/etc/x.safetensors': is no plain file name"),
    "index of other files": (index("config.json"), f"{INDEX_FILE}: weight_map.{NORM}: "),
    "index of nothing": (index("none.safetensors"), "none.safetensors: file is missing"),
    "NaN": (nan, f"{SINGLE_FILE}: {NORM}: holds NaN"),
    "wrong type": (config(hidden_size="64"), "config.json: hidden_size: "),
    "huge number": (config(num_hidden_layers=10**12), "config.json: num_hidden_layers: "),
    "deep": (text("config.json", '{"a":' * 500_000), "config.json: is no JSON: nested too deeply"),
    "twice": (
        text("config.json", '{"hidden_size": 1, "hidden_size": 2}'),
        "config.json: 'hidden_size': is there twice",
    ),
    "no UTF-8": (text("config.json", b'{"a": "\xff"}'), "config.json: is no JSON"),
    "tokenizer broken": (text("tokenizer.json", "{}"), "tokenizer.json: "),
    "generation config broken": (text("generation_config.json", "["), "generation_config.json: is no JSON"),
    "template broken": (text("tokenizer_config.json", '{"chat_template": 7}'), "chat_template: 7 is no text"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each folder."""
    base = tmp_path_factory.mktemp("hostile")
    make_tiny_checkpoint(base / "good")
    convert(base / "good", base / "converted")
    folders = []
    for number, (tamper, _) in enumerate(HOSTILE.values()):
        folders.append(shutil.copytree(base / "good", base / f"h{number}"))
        tamper(folders[-1])
    command = [sys.executable, "-m", "tests.support.audited_load", base / "good", *folders, base / "converted"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not (base / "was_run").exists()
    assert lines[-1]["outcome"] == "loaded"
    assert "weights" in str(lines[-1]["events"]), "the hook sees the files of a good folder"
    return dict(zip([*HOSTILE, "converted"], zip(lines, [*folders, base / "converted"], strict=True), strict=True))


@pytest.mark.parametrize("name", [*HOSTILE, "converted"])
def test_refused_by_name_and_nothing_was_run(outcomes, name):
    outcome, folder = outcomes[name]
    words = HOSTILE[name][1] if name in HOSTILE else "loaded"
    assert words in outcome["outcome"]
    assert len(outcome["outcome"]) < 1000
    if outcome["outcome"] != "loaded":
        assert str(folder) in outcome["outcome"]
        assert name == "NaN" or outcome["placed"] == 0, "refused before anything was placed"
    for event, argument in outcome["events"]:
        assert event in ALLOWED, (event, argument)
        assert Path(argument).is_relative_to(folder), (event, argument)
