"""A process that could not map another executable says so."""

import mmap

import pytest

from loong_jax import mappings


def test_more_mappings_are_counted():
    before = mappings.num_mappings()
    if before is None:
        pytest.skip("this system does not tell a process its mappings")
    # alternating protections keep the kernel from joining neighbours
    held = [mmap.mmap(-1, 4096, prot=mmap.PROT_READ if i % 2 else mmap.PROT_READ | mmap.PROT_WRITE) for i in range(100)]
    assert mappings.num_mappings() >= before + 50
    assert len(held) == 100


@pytest.mark.parametrize(
    ("used", "limit", "room"), [(100, 65530, True), (60_000, 65530, False), (None, 65530, True), (60_000, None, True)]
)
def test_room(monkeypatch: pytest.MonkeyPatch, used: int | None, limit: int | None, room: bool):
    monkeypatch.setattr(mappings, "num_mappings", lambda: used)
    monkeypatch.setattr(mappings, "max_mappings", lambda: limit)
    assert mappings.room_for_executable() is room
