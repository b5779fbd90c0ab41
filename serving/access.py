"""Who may call the server, and over which connections: the rules, for gRPC and HTTP alike.

What it is not: the keys themselves (`serving/keys.py`), or how a protocol carries them (`serving/grpc_access.py`,
`serving/http/access.py`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from loong_jax.config import ConfigError
from serving import context
from serving.errors import Forbidden, TooManyCalls, Unauthenticated
from serving.keys import MAX_KEYS, Key, KeyLimits, KeyRing, Meter

_log = logging.getLogger(__name__)
_RETRY_MS = 1000
_BEARER = "bearer "


class AccessConfig(msgspec.Struct, frozen=True):
    """Who may call. `keys` None: whoever can connect. `tls_client_ca`: only with a certificate that one of these
    authorities signed. `anyone`: the operator means it."""

    keys: Path | None = None
    limits: KeyLimits = KeyLimits()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    anyone: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls-cert: goes with --tls-key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls-client-ca: needs --tls-cert and --tls-key")
        if self.keys is None and self.limits != KeyLimits():
            raise ConfigError("api-keys: needed for limits of each key")
        if not 0 <= self.limits.requests_per_s < float("inf"):
            raise ConfigError(f"key-requests-per-s: {self.limits.requests_per_s} is no rate")
        if self.limits.streams < 0:
            raise ConfigError(f"key-streams: {self.limits.streams} is negative")

    @property
    def controlled(self) -> bool:
        return self.keys is not None or self.tls_client_ca is not None


def check_exposure(host: str, config: AccessConfig) -> None:
    """Nobody opens a server to the world by a slip. Raises ConfigError."""
    if is_loopback(host) or config.controlled or config.anyone:
        return
    raise ConfigError(
        f"host: {host!r} may be reached from other machines, and anyone there could use the server; give --api-keys "
        "or --tls-client-ca, or say --allow-anyone"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. A name that is not `localhost` may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """The keys and what each has in use. All methods belong to one asyncio loop."""

    def __init__(self, config: AccessConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """`config` has keys. Raises ConfigError."""
        if config.keys is None:
            raise ConfigError("api-keys: needed")
        self._ring = KeyRing(config.keys, clock)
        self._limits = config.limits
        self._clock = clock
        self._meters: dict[str, Meter] = {}

    def authenticate(self, authorization: str | None, *, operator: bool = False) -> Key:
        """Whose call it is, by the header or metadata `authorization`. Raises Unauthenticated, Forbidden."""
        if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated("authorization: 'Bearer KEY' is needed")
        key = self._ring.find(authorization[len(_BEARER) :].strip())
        if key is None:
            raise Unauthenticated("authorization: no such key")
        if operator and not key.operator:
            raise Forbidden(f"authorization: the key of {key.name} is not an operator's")
        return key

    @contextlib.contextmanager
    def call(self, key: Key) -> Iterator[None]:
        """Around a call of that key, which `context.caller` then names. Raises TooManyCalls."""
        meter = self._meters.get(key.name)
        now_s = self._clock()
        if meter is None:
            self._forget_idle()
            meter = self._meters[key.name] = Meter(self._limits, now_s)
        if meter.full:
            raise TooManyCalls(f"key-streams: {key.name} has {meter.open} calls open, the most it may", _RETRY_MS)
        wait_ms = meter.wait_ms(now_s)
        if wait_ms:
            rate = self._limits.requests_per_s
            raise TooManyCalls(f"key-requests-per-s: {key.name} may send {rate:g} requests a second", wait_ms)
        meter.open += 1
        before = context.caller.set(key.name)
        try:
            yield
        finally:
            context.caller.reset(before)
            meter.open -= 1

    def _forget_idle(self) -> None:
        """Names come and go with the file; what is in use is kept."""
        if len(self._meters) >= 2 * MAX_KEYS:
            self._meters = {name: meter for name, meter in self._meters.items() if meter.open}


class TlsFiles:
    """A certificate, its key, and the authorities of clients, from files that may be renewed while the server runs.
    May be asked from any thread."""

    def __init__(self, config: AccessConfig) -> None:
        """`config` has a certificate. Raises ConfigError."""
        if config.tls_cert is None or config.tls_key is None:
            raise ConfigError("tls-cert: needed")
        self._paths = [config.tls_cert, config.tls_key]
        if config.tls_client_ca is not None:
            self._paths.append(config.tls_client_ca)
        self.asks_clients = config.tls_client_ca is not None
        self._lock = threading.Lock()
        self._stamps: list[tuple[int, int]] = []
        self._pems: list[bytes] = []
        self._context: ssl.SSLContext
        self._take()

    def pems(self) -> list[bytes]:
        """Certificate chain, key, and authorities if clients are asked; another list after a renewal."""
        with self._lock:
            self._look()
            return self._pems

    def context(self) -> ssl.SSLContext:
        """For a listener of Python's: connections made after a renewal have the new certificate."""
        with self._lock:
            self._look()
            return self._context

    def _look(self) -> None:
        try:
            if [_stamp(path) for path in self._paths] == self._stamps:
                return
            self._take()
        except (ConfigError, OSError) as error:  # half renewed, or wrong: the old ones go on
            _log.error("%s; the certificates stay as they are", error)
        else:
            _log.info("tls-cert: %s read again", self._paths[0])

    def _take(self) -> None:
        """Raises ConfigError."""
        cert, key, *client_ca = self._paths
        try:
            stamps = [_stamp(path) for path in self._paths]
            pems = [path.read_bytes() for path in self._paths]
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(cert, key)
            if client_ca:
                context.load_verify_locations(client_ca[0])
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"tls-cert: {', '.join(map(str, self._paths))}: {error}") from None
        context.sni_callback = self._newest  # asked at each handshake
        self._stamps, self._pems, self._context = stamps, pems, context

    def _newest(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self.context()


def _stamp(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ino
