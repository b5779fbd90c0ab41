"""The rules of access: what goes together, what is exposed, whose call it is, how many there may be; TLS files."""

import ssl
from pathlib import Path

import pytest

from loong_jax.config import ConfigError
from serving.access import Access, AccessConfig, TlsFiles, check_exposure, is_loopback
from serving.errors import Forbidden, TooManyCalls, Unauthenticated
from serving.keys import KeyLimits
from tests.support.certificates import make_certificates

ALICE, BOB = "alice-0123456789", "bob-0123456789abc"
SOME = Path("some.pem")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\nbob {BOB} operator\n")
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tls_cert": SOME}, "tls-cert: goes with --tls-key"),
        ({"tls_key": SOME}, "tls-cert: goes with --tls-key"),
        ({"tls_client_ca": SOME}, "tls-client-ca: needs --tls-cert"),
        ({"limits": KeyLimits(streams=1)}, "api-keys: needed"),
        ({"keys": SOME, "limits": KeyLimits(requests_per_s=float("nan"))}, "key-requests-per-s: nan"),
        ({"keys": SOME, "limits": KeyLimits(requests_per_s=float("inf"))}, "key-requests-per-s: inf"),
        ({"keys": SOME, "limits": KeyLimits(streams=-1)}, "key-streams: -1"),
    ],
)
def test_what_does_not_go_together_is_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        AccessConfig(**fields)


def test_loopback():
    for host in ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"):
        assert is_loopback(host), host
        check_exposure(host, AccessConfig())
    for host in ("0.0.0.0", "::", "10.0.0.1", "192.168.1.1", "example.com", "localhost.example.com", "", "2130706433"):
        assert not is_loopback(host), host


def test_beyond_loopback_takes_control_or_a_word():
    tls = {"tls_cert": SOME, "tls_key": SOME}
    for config in (AccessConfig(), AccessConfig(**tls)):
        with pytest.raises(ConfigError, match="host: '0.0.0.0' .*--api-keys.*--tls-client-ca.*--allow-anyone"):
            check_exposure("0.0.0.0", config)
    for config in (AccessConfig(keys=SOME), AccessConfig(**tls, tls_client_ca=SOME), AccessConfig(anyone=True)):
        check_exposure("0.0.0.0", config)


def test_whose_call_it_is(keys):
    access = Access(AccessConfig(keys=keys))
    assert access.authenticate(f"Bearer {ALICE}").name == "alice"
    assert access.authenticate(f"bearer  {BOB} ", operator=True).name == "bob"
    for wrong in (None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer \x00"):
        with pytest.raises(Unauthenticated, match="authorization: "):
            access.authenticate(wrong)
    with pytest.raises(Forbidden, match="alice"):
        access.authenticate(f"Bearer {ALICE}", operator=True)


def test_each_key_has_its_own_limits(keys):
    now_s = 0.0
    limits = KeyLimits(requests_per_s=10, streams=2)
    access = Access(AccessConfig(keys=keys, limits=limits), lambda: now_s)
    alice, bob = (access.authenticate(f"Bearer {key}") for key in (ALICE, BOB))
    with access.call(alice), access.call(alice):
        with pytest.raises(TooManyCalls, match="key-streams: alice has 2") as error, access.call(alice):
            pass
        assert error.value.retry_ms
        with access.call(bob):
            pass
    for _ in range(8):
        with access.call(alice):
            pass
    with pytest.raises(TooManyCalls, match="key-requests-per-s: alice may send 10") as error, access.call(alice):
        pass
    assert error.value.retry_ms == 100
    now_s = 0.1
    with access.call(alice):
        pass
    with pytest.raises(ZeroDivisionError), access.call(bob):
        raise ZeroDivisionError
    assert access._meters["bob"].open == 0


def test_tls_files_are_checked_and_renewed(tmp_path):
    made = make_certificates(tmp_path)
    files = TlsFiles(made.config(asks_clients=True))
    first = files.pems()
    assert first == [made.server_cert.read_bytes(), made.server_key.read_bytes(), made.ca.read_bytes()]
    assert files.pems() is first
    assert files.context().verify_mode is ssl.CERT_REQUIRED
    other = make_certificates((tmp_path / "other").mkdir() or tmp_path / "other")
    made.server_cert.write_bytes(other.server_cert.read_bytes())
    assert files.pems() is first, "half renewed: the certificate is not the key's"
    made.server_key.write_bytes(other.server_key.read_bytes())
    assert files.pems()[0] == other.server_cert.read_bytes()


def test_wrong_tls_files_are_named(tmp_path):
    made = make_certificates(tmp_path)
    made.server_key.write_text("no key")
    with pytest.raises(ConfigError, match="tls-cert: .*server_key.pem"):
        TlsFiles(made.config())
    made.server_key.unlink()
    with pytest.raises(ConfigError, match="tls-cert: .*server_key.pem"):
        TlsFiles(made.config())
