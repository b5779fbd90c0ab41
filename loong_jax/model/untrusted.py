"""Reading the small files of a checkpoint that somebody else made: nothing outside its folder, nothing too large,
nothing ambiguous.

What it is: which paths may be opened, and JSON without duplicate keys, NaN or bottomless nesting. Every refusal is a
CheckpointError that names the file. Pure Python on file descriptors, so that an audit hook sees each file opened.
What it is not: the meaning of any file (`hf_config.py`, `safetensors_reader.py`, `orbax_reader.py`).
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 * 1024 * 1024
_SHOWN_CHARS = 200


class CheckpointError(ValueError):
    """A checkpoint that cannot be served. The message names the file and the field or tensor."""


def shown(value: object) -> str:
    """A value as error messages show it: not longer than a person reads."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def is_there(directory: Path, name: str) -> bool:
    """Whether a file, or a link (sound or not: `locate` says), has this name."""
    return os.path.lexists(directory / name)


def locate(directory: Path, name: str) -> Path:
    """The real path of the file `name` of a checkpoint folder. `name` is a plain name, and a link may lead only to a
    file of the same folder or, from `snapshots/REVISION` of a Hugging Face cache, to one of `blobs` of the same model.

    Raises CheckpointError."""
    path = directory / name
    printable = name.isprintable() and len(name) <= 255
    if name in ("", ".", "..") or "/" in name or "\\" in name or not printable:
        raise CheckpointError(f"{directory}: {shown(name)}: is no plain file name")
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            folder, target = directory.resolve(strict=True), path.resolve(strict=True)
            homes = [folder]
            if folder.parent.name == "snapshots":
                homes.append(folder.parent.parent / "blobs")
            if target.parent not in homes:
                raise CheckpointError(f"{path}: is a link out of the folder")
            path, mode = target, target.lstat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is no regular file")
    return path


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a path that `locate` gave. Should it have become a link or a pipe since, it is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is no regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_exactly(path: Path, descriptor: int, out: memoryview, offset: int) -> None:
    """Fill `out` from `offset` of the file. Raises CheckpointError where it ends before."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset + done}; it changed while it was read")
        done += count


def read_bytes(directory: Path, name: str, max_bytes: int) -> bytes:
    """The content of a file. Raises CheckpointError."""
    path = locate(directory, name)
    with opened(path) as (descriptor, size):
        if size > max_bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes are more than the limit of {max_bytes}")
        content = bytearray(size)
        read_exactly(path, descriptor, memoryview(content), 0)
    return bytes(content)


def read_object(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    return parse_object(read_bytes(directory, name, max_bytes), str(directory / name))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """JSON text as an object; `where` is named in the CheckpointError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{where}: {shown(name)}: is there twice")
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise CheckpointError(f"{where}: is no JSON: holds {constant}")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{where}: is no JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: is no JSON: {str(error)[:_SHOWN_CHARS]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is no JSON object")
    return value


def is_sizes(value: object) -> bool:
    """Whether a JSON value is a list of sizes: integers, no booleans, not negative, none absurd."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)
