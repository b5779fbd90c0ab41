"""Entries of the program store: what comes back, what is ignored, what is thrown out."""

import logging
import os
import stat

import jax
import pytest

from loong_jax import program_store
from loong_jax.program_store import ProgramStore, environment, fingerprint
from loong_jax.retarget import Serialized

TREE = jax.tree.structure(((1, {"a": 2}), {}))
ENTRY = Serialized(b"machine code" * 100, TREE, jax.tree.structure([1]), (0, 1))
KEY = {"jax": "1", "dop": 2, "devices": [0, 1]}


@pytest.fixture
def store(tmp_path):
    return ProgramStore(tmp_path / "programs")


def test_round_trip(store):
    assert store.get(KEY) is None
    store.put(KEY, ENTRY)
    assert store.get(KEY) == ENTRY
    assert store.get(dict(reversed(KEY.items()))) == ENTRY
    assert [p.suffix for p in store.directory.iterdir()] == [".program"]


@pytest.mark.parametrize("name", list(KEY))
def test_every_part_of_the_key_counts(store, name):
    store.put(KEY, ENTRY)
    assert store.get(KEY | {name: "other"}) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e[:40], "checksum"),
        (lambda e: e[:-1], "checksum"),
        (lambda e: e[:200] + bytes([e[200] ^ 1]) + e[201:], "checksum"),
        (lambda e: b"", "not a program entry"),
        (lambda e: b"\x80\x04" + e, "not a program entry"),
    ],
)
def test_damaged_entry_is_ignored_logged_and_replaceable(store, caplog, damage, message):
    store.put(KEY, ENTRY)
    path = store.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
    assert message in caplog.text
    store.put(KEY, ENTRY)
    assert store.get(KEY) == ENTRY


def test_entry_of_another_key_is_ignored(store, caplog):
    store.put(KEY, ENTRY)
    other = KEY | {"dop": 3}
    os.replace(store.path(KEY), store.path(other))
    assert store.get(other) is None
    assert "another key" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners on this system")
def test_entry_of_another_user_is_ignored(store, caplog, monkeypatch):
    store.put(KEY, ENTRY)
    monkeypatch.setattr(os, "getuid", lambda: store.path(KEY).stat().st_uid + 1)
    assert store.get(KEY) is None
    assert "another user" in caplog.text


def test_directory_is_private(store):
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_size_bound_throws_out_what_was_used_longest_ago(tmp_path):
    entry_bytes = len(program_store._encode(KEY, ENTRY))
    store = ProgramStore(tmp_path, max_bytes=3 * entry_bytes + 10)
    keys = [KEY | {"dop": dop} for dop in range(1, 6)]
    for age, key in enumerate(keys[:3]):
        store.put(key, ENTRY)
        os.utime(store.path(key), (1000 + age, 1000 + age))
    assert store.get(keys[0]) == ENTRY  # used now: key 1 is the oldest
    store.put(keys[3], ENTRY)
    assert store.get(keys[1]) is None
    assert all(store.get(keys[i]) == ENTRY for i in (0, 2, 3))
    assert store.size_bytes() <= 3 * entry_bytes + 10


def test_entry_larger_than_the_bound_is_not_kept(tmp_path, caplog):
    store = ProgramStore(tmp_path, max_bytes=100)
    store.put(KEY, ENTRY)
    assert store.get(KEY) is None
    assert "exceeds the bound" in caplog.text


def test_unwritable_store_is_no_error(store, caplog, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    store.put(KEY, ENTRY)
    assert "no space left" in caplog.text
    assert list(store.directory.iterdir()) == []


def test_environment_names_versions_hardware_and_options():
    device = jax.devices()[0]
    here = environment(device)
    assert here["jax"] == jax.__version__
    assert here["device_kind"] == device.device_kind
    assert here == environment(device)
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert environment(device)["options"] != here["options"]
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert environment(device) == here


def test_fingerprint_covers_sources_and_parts(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1")
    before = fingerprint([tmp_path], "model", "flags")
    assert before == fingerprint([tmp_path], "model", "flags")
    assert before != fingerprint([tmp_path], "model", "other flags")
    assert fingerprint([tmp_path], "ab", "c") != fingerprint([tmp_path], "a", "bc")
    (tmp_path / "sub" / "a.py").write_text("x = 2")
    assert before != fingerprint([tmp_path], "model", "flags")
    (tmp_path / "sub" / "a.py").write_text("x = 1")
    (tmp_path / "sub" / "a.py").rename(tmp_path / "sub" / "b.py")
    assert before != fingerprint([tmp_path], "model", "flags")
