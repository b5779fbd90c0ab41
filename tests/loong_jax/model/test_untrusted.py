"""Which files of a checkpoint folder may be opened, and what JSON is taken."""

import os

import pytest

from loong_jax.model.untrusted import CheckpointError, is_sizes, locate, parse_object, read_bytes, read_object, shown


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "outside.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["", ".", "..", "../outside.json", "a/b", "/etc/hostname", "a\\b", "a\0b", "\ud800"])
def test_only_plain_names(folder, name):
    with pytest.raises(CheckpointError, match="is no plain file name"):
        locate(folder, name)


@pytest.mark.parametrize("target", ["../outside.json", "/etc/hostname", "loop"])
def test_links_out_of_the_folder(folder, target):
    (folder / "loop").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop")
    (folder / "config.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"config\.json: (is a link out of the folder|cannot be read)"):
        locate(folder, "config.json")


def test_links_within_the_folder_and_a_linked_folder(folder, tmp_path):
    (folder / "real").write_text("{}")
    (folder / "config.json").symlink_to("real")
    assert locate(folder, "config.json") == (folder / "real").resolve()
    (tmp_path / "alias").symlink_to(folder)
    assert read_object(tmp_path / "alias", "config.json") == {}


def test_the_cache_of_the_hub(tmp_path):
    """models--x/snapshots/REVISION/config.json -> ../../blobs/HASH, and nowhere else."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "models--y" / "blobs").mkdir(parents=True)
    (tmp_path / "models--y" / "blobs" / "456").write_text("{}")
    (blobs / "onward").symlink_to(tmp_path / "secret")
    for name, target in [
        ("good", "../../blobs/123"),
        ("up", "../../../secret"),
        ("other", "../../../models--y/blobs/456"),
        ("onward", "../../blobs/onward"),
        ("folder", "../../blobs"),
    ]:
        (snapshot / name).symlink_to(target)
    assert read_object(snapshot, "good") == {}
    for name in ("up", "other", "onward", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}: is a link out of the folder"):
            locate(snapshot, name)
    elsewhere = tmp_path / "models--x" / "other" / "abc"
    elsewhere.mkdir(parents=True)
    (elsewhere / "good").symlink_to("../../blobs/123")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        locate(elsewhere, "good")


def test_pipes_and_folders_are_no_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    for name in ("pipe", "sub"):
        with pytest.raises(CheckpointError, match=f"{name}: is no regular file"):
            read_bytes(folder, name, 100)


def test_too_large(folder):
    (folder / "a").write_bytes(b"12345")
    assert read_bytes(folder, "a", 5) == b"12345"
    with pytest.raises(CheckpointError, match="a: 5 bytes are more than the limit of 4"):
        read_bytes(folder, "a", 4)
    with pytest.raises(CheckpointError, match="b: file is missing"):
        read_bytes(folder, "b", 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[]", "is no JSON object"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b'{"a": Infinity}', "is no JSON: holds Infinity"),
        (b'{"a": {"b": 1, "b": 2}}', "'b': is there twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "is no JSON"),
    ],
)
def test_refused_json(text, words):
    with pytest.raises(CheckpointError, match=f"^here: .*{words}"):
        parse_object(text, "here")


def test_sizes():
    assert is_sizes([])
    assert is_sizes([0, 5])
    for bad in (None, "12", [True], [1.0], [-1], [2**60], [[1]], {"0": 1}):
        assert not is_sizes(bad)


def test_long_values_are_cut():
    assert len(shown("x" * 10_000)) < 300
    assert shown([1]) == "[1]"
