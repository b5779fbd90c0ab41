"""Keys of a file, what is refused in it, and that it is read again; what a key uses."""

import os

import pytest

from loong_jax.config import ConfigError
from serving import keys
from serving.keys import Key, KeyLimits, KeyRing, Meter

ALICE, BOB = "alice-0123456789", "bob-0123456789abc"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ring(path, clock=None) -> KeyRing:
    return KeyRing(path, clock or Clock())


def write(path, text: str, stamp_s: int = 1) -> None:
    path.write_text(text)
    os.utime(path, (stamp_s, stamp_s))  # whatever the clock of the file system resolves


def test_names_roles_and_comments(tmp_path):
    path = tmp_path / "keys"
    write(path, f"# who may call\n\nalice {ALICE}  # she\nbob\t{BOB} operator\n")
    found = ring(path)
    assert found.find(ALICE) == Key("alice")
    assert found.find(BOB) == Key("bob", operator=True)
    for other in ("", "alice", ALICE[:-1], ALICE + "x", f"{ALICE} ", "é" * 20):
        assert found.find(other) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has 0 keys"),
        ("# nothing\n", "has 0 keys"),
        (ALICE, "line 1: must be NAME KEY"),
        (f"a {ALICE}\nb short", "line 2: the key must have 16 to 512"),
        (f"a {'x' * 513}", "line 1: the key must have 16 to 512"),
        (f"{'a' * 101} {ALICE}", "line 1: the name is longer than 100"),
        (f"a {ALICE} root", "line 1: after the key only 'operator'"),
        (f"a {ALICE} operator too", "line 1: must be NAME KEY"),
        (f"a {ALICE}\nb {ALICE}", "line 2: the name or the key was there before"),
        (f"a {ALICE}\na {BOB}", "line 2: the name or the key was there before"),
        ("a schlüssel-0123456789", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_without_the_key(tmp_path, text, words):
    path = tmp_path / "keys"
    write(path, text)
    with pytest.raises(ConfigError, match=f"api-keys: .*{words}") as error:
        ring(path)
    assert ALICE not in str(error.value)
    assert "short" not in str(error.value)


def test_a_file_that_is_too_large_or_missing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="api-keys: .*cannot be read"):
        ring(tmp_path / "none")
    monkeypatch.setattr(keys, "MAX_FILE_BYTES", 10)
    write(tmp_path / "keys", f"a {ALICE}")
    with pytest.raises(ConfigError, match="more than 10 bytes"):
        ring(tmp_path / "keys")


def test_a_changed_file_is_read_again_within_a_second(tmp_path):
    path, clock = tmp_path / "keys", Clock()
    write(path, f"alice {ALICE}")
    found = ring(path, clock)
    write(path, f"bob {BOB}", 2)
    clock.now_s += 0.9
    assert found.find(BOB) is None, "not looked at before a second has passed"
    clock.now_s += 0.2
    assert found.find(BOB) == Key("bob")
    assert found.find(ALICE) is None


def test_a_file_that_goes_wrong_leaves_the_keys_and_is_told_once(tmp_path, caplog):
    path, clock = tmp_path / "keys", Clock()
    write(path, f"alice {ALICE}")
    found = ring(path, clock)
    for stamp_s, break_it in ((2, lambda: write(path, "nonsense", 2)), (3, path.unlink)):
        caplog.clear()
        break_it()
        for _ in range(3):
            clock.now_s += 2
            assert found.find(ALICE) == Key("alice"), stamp_s
        assert len([r for r in caplog.records if "stay as they are" in r.message]) <= 1
    write(path, f"bob {BOB}", 4)
    clock.now_s += 2
    assert found.find(ALICE) is None
    assert found.find(BOB) == Key("bob")


def test_a_link_that_is_turned_counts_as_a_change(tmp_path):
    """As mounted secrets are renewed."""
    clock, link = Clock(), tmp_path / "keys"
    for name, text in (("1", f"alice {ALICE}"), ("2", f"alice {BOB[:16]}")):
        write(tmp_path / name, text)
    link.symlink_to(tmp_path / "1")
    found = ring(link, clock)
    link.unlink()
    link.symlink_to(tmp_path / "2")
    clock.now_s += 2
    assert found.find(BOB[:16]) == Key("alice")


def test_a_rate_is_a_bucket_of_one_second():
    meter = Meter(KeyLimits(requests_per_s=4), 0.0)
    assert [meter.wait_ms(0.0) for _ in range(6)] == [0, 0, 0, 0, 250, 250]
    assert [meter.wait_ms(0.25), meter.wait_ms(0.25)] == [0, 250]
    assert [meter.wait_ms(100.0) for _ in range(5)] == [0, 0, 0, 0, 250], "no more than a second's is saved"
    slow = Meter(KeyLimits(requests_per_s=0.5), 0.0)
    assert [slow.wait_ms(0.0), slow.wait_ms(0.0), slow.wait_ms(2.0)] == [0, 2000, 0]
    assert {Meter(KeyLimits(), 0.0).wait_ms(0.0) for _ in range(1000)} == {0}


def test_open_calls_are_counted():
    meter = Meter(KeyLimits(streams=2), 0.0)
    meter.open = 1
    assert not meter.full
    meter.open = 2
    assert meter.full
    unlimited = Meter(KeyLimits(), 0.0)
    unlimited.open = 10**6
    assert not unlimited.full
