"""Compiled programs on disk: a warm start needs no trace, no lowering and no compile (DESIGN 5 "Programs").

What it is: a directory of serialized executables, one file per key, written atomically, bounded in size, oldest use
goes first. What is corrupt, foreign or written for another key is logged and ignored.
What it is not: JAX's persistent cache, which is switched on as well for everything else (`enable_jax_cache`); that one
is asked only after tracing and lowering, and on CPU what comes out of it cannot be serialized again.

Entries hold machine code and pickles: loading one runs it. So the directory is made private, and on POSIX a file
that belongs to another user is not read. Give several replicas a shared directory only if they trust each other.
"""

import hashlib
import json
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import jax

from loong_jax.retarget import Device, Serialized

log = logging.getLogger(__name__)

_MAGIC = b"LOONG-PROGRAM-1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_SUFFIX = ".program"
_DEFAULT_MAX_BYTES = 8 << 30

Key = Mapping[str, str | int | list[int]]
"""Everything the executable depends on, by name; kept in the entry for people and compared on reading."""


class ProgramStore:
    """`directory` is created if missing. `max_bytes` bounds the sum of the entries."""

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int = _DEFAULT_MAX_BYTES):
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._max_bytes = max_bytes

    def get(self, key: Key) -> Serialized | None:
        """The executable stored under `key`, or None. Never raises for what it finds on disk."""
        path = self.path(key)
        try:
            if _foreign(path):
                log.warning("program store: %s belongs to another user; ignored", path)
                return None
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("program store: cannot read %s: %s", path, error)
            return None
        try:
            serialized = _decode(entry, key)
        except Exception as error:  # pickle raises whatever the bytes make it do
            log.warning("program store: %s ignored: %s: %s", path, type(error).__name__, error)
            return None
        try:
            os.utime(path)  # last use, for `_evict`
        except OSError:
            pass
        return serialized

    def put(self, key: Key, serialized: Serialized) -> None:
        """Write or replace an entry. A full or read-only disk is logged, not raised: the store is an optimisation."""
        try:
            entry = _encode(key, serialized)
            if len(entry) > self._max_bytes:
                log.warning("program store: an entry of %d bytes exceeds the bound; not kept", len(entry))
                return
            descriptor, temporary = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(entry)
                os.replace(temporary, self.path(key))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except Exception as error:
            log.warning("program store: cannot write to %s: %s", self.directory, error)
            return
        self._evict()

    def discard(self, key: Key) -> None:
        """Forget an entry that did not load."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            log.warning("program store: cannot remove an entry: %s", error)

    def path(self, key: Key) -> Path:
        return self.directory / (hashlib.sha256(_describe(key)).hexdigest()[:40] + _SUFFIX)

    def size_bytes(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path), oldest first. Entries may vanish under us: another process may evict too."""
        out = []
        for path in self.directory.glob("*" + _SUFFIX):
            try:
                stat = path.stat()
            except OSError:
                continue
            out.append((stat.st_mtime, stat.st_size, path))
        return sorted(out)

    def _evict(self) -> None:
        entries = self._entries()
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in entries:
            if excess <= 0:
                break
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("program store: cannot remove %s: %s", path, error)
                continue
            excess -= size


def _describe(key: Key) -> bytes:
    return json.dumps(dict(key), sort_keys=True).encode()


def _encode(key: Key, serialized: Serialized) -> bytes:
    description = _describe(key)
    body = len(description).to_bytes(4, "little") + description + pickle.dumps(tuple(serialized))
    return _MAGIC + hashlib.sha256(body).digest() + body


def _decode(entry: bytes, key: Key) -> Serialized:
    if not entry.startswith(_MAGIC):
        raise ValueError("not a program entry")
    digest, body = entry[len(_MAGIC) :][:_DIGEST_BYTES], memoryview(entry)[len(_MAGIC) + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("checksum does not match")
    end = 4 + int.from_bytes(body[:4], "little")
    if bytes(body[4:end]) != _describe(key):
        raise ValueError("written for another key")
    return Serialized(*pickle.loads(body[end:]))


def _foreign(path: Path) -> bool:
    return hasattr(os, "getuid") and path.stat().st_uid != os.getuid()


def environment(device: Device) -> dict[str, str | int]:
    """What an executable depends on besides the program: versions, hardware, and JAX's own options. XLA_FLAGS and the
    like are the caller's to add (its `fingerprint`): nothing below the command line reads the environment."""
    return {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(device.platform),
        "host": _host_cpu() if device.platform == "cpu" else platform.machine(),
        "options": _digest(f"{name}={value}" for name, value in sorted(jax.config.values.items()) if _matters(name)),
    }


def _matters(option: str) -> bool:
    """Options that say where to cache or what to print do not change code."""
    return not any(word in option for word in ("_cache_", "_log_", "logging", "dump", "traceback"))


def _host_cpu() -> str:
    """CPU executables use the instruction set of the machine that compiled them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return _digest(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _digest(parts: Iterable[str]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode())
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def fingerprint(packages: Iterable[str | os.PathLike[str]], *parts: str) -> str:
    """Digest of all Python sources below the directories `packages`, and of `parts` (configurations, backend flags)."""
    sources = []
    for package in packages:
        root = Path(package)
        for path in sorted(root.rglob("*.py")):
            sources += [path.relative_to(root).as_posix(), path.read_text()]
    return _digest([*sources, *parts])


def enable_jax_cache(directory: str | os.PathLike[str]) -> None:
    """Switch JAX's persistent compilation cache on for every program, however small (start-up only, by the CLI)."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX decides once, at the first compile, whether there is a cache
