"""Keys that callers show, from a file that may change while the server runs, and what each key may use.

What it is not: the question whether a call is let in (`serving/access.py`).
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from loong_jax.config import ConfigError

_log = logging.getLogger(__name__)

MAX_KEYS = 10_000
MAX_FILE_BYTES = 4 * 1024 * 1024
MIN_KEY_CHARS = 16
MAX_KEY_CHARS = 512
MAX_NAME_CHARS = 100
_LOOK_S = 1.0
_OPERATOR = "operator"


class Key(msgspec.Struct, frozen=True):
    """Whose a key is. `operator`: may also use the methods that concern everybody (Drain, profiles)."""

    name: str
    operator: bool = False


class KeyLimits(msgspec.Struct, frozen=True):
    """What each key may use; 0: as much as it wants."""

    requests_per_s: float = 0.0
    streams: int = 0


class KeyRing:
    """The keys of a file: a line each, `NAME KEY` or `NAME KEY operator`; `#` begins a comment.

    A changed file is read again within a second of the next call. One that cannot be read then leaves the keys as they
    are, and is told in the log: a slip of the pen locks nobody out, and lets nobody in. Raises ConfigError at first.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = clock()
        self._seen, self._keys = self._read()

    def find(self, given: str) -> Key | None:
        """Whose key that is. How long it takes tells nothing about the keys: what is looked up and compared are
        digests under a secret of this process, which nobody can aim at."""
        self._look()
        digest = self._digest(given)
        found = self._keys.get(digest)
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1]

    def _look(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        try:
            if _stamp(self._path) == self._seen:
                return
            self._seen, self._keys = self._read()
        except ConfigError as error:
            if self._seen is not None:  # told once for each change
                _log.error("%s; the keys stay as they are", error)
            self._seen = None
        else:
            _log.info("api-keys: %d keys read from %s", len(self._keys), self._path)

    def _read(self) -> tuple[tuple[int, int, int], dict[bytes, tuple[bytes, Key]]]:
        stamp = _stamp(self._path)
        if stamp[1] > MAX_FILE_BYTES:
            raise ConfigError(f"api-keys: {self._path} has more than {MAX_FILE_BYTES} bytes")
        try:
            text = self._path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api-keys: {self._path} cannot be read: {error}") from None
        keys: dict[bytes, tuple[bytes, Key]] = {}
        names: set[str] = set()
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            key, secret = _parsed(words, f"api-keys: {self._path}, line {number}")
            digest = self._digest(secret)
            if key.name in names or digest in keys:
                raise ConfigError(f"api-keys: {self._path}, line {number}: the name or the key was there before")
            names.add(key.name)
            keys[digest] = (digest, key)
        if not 1 <= len(keys) <= MAX_KEYS:
            raise ConfigError(f"api-keys: {self._path} has {len(keys)} keys, not 1 to {MAX_KEYS}")
        return stamp, keys

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._secret, secret.encode(), "sha256")


class Meter:
    """What one key uses: a bucket of one second's requests, refilled all the time, and open calls."""

    def __init__(self, limits: KeyLimits, now_s: float) -> None:
        self._limits = limits
        self._most = max(1.0, limits.requests_per_s)
        self._left = self._most
        self._filled_s = now_s
        self.open = 0

    def wait_ms(self, now_s: float) -> int:
        """0, and one request is counted; or how long until there is room for one."""
        rate = self._limits.requests_per_s
        if rate <= 0:
            return 0
        self._left = min(self._most, self._left + (now_s - self._filled_s) * rate)
        self._filled_s = now_s
        if self._left < 1:
            return max(1, round((1 - self._left) / rate * 1000))
        self._left -= 1
        return 0

    @property
    def full(self) -> bool:
        return 0 < self._limits.streams <= self.open


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when the file does, also when a link to it is turned. Raises ConfigError."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"api-keys: {path} cannot be read: {error}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _parsed(words: list[str], where: str) -> tuple[Key, str]:
    """Raises ConfigError; its words never hold what may be a key."""
    if len(words) not in (2, 3):
        raise ConfigError(f"{where}: must be NAME KEY or NAME KEY operator")
    name, secret, *role = words
    if not (len(name) <= MAX_NAME_CHARS and name.isprintable()):
        raise ConfigError(f"{where}: the name is longer than {MAX_NAME_CHARS} characters or not printable")
    if not (MIN_KEY_CHARS <= len(secret) <= MAX_KEY_CHARS and secret.isprintable()):
        raise ConfigError(f"{where}: the key must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable characters")
    if role not in ([], [_OPERATOR]):
        raise ConfigError(f"{where}: after the key only 'operator' may stand")
    return Key(name, bool(role)), secret
