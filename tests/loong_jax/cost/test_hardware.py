"""Records of hardware are complete and in the right order of magnitude."""

from __future__ import annotations

import pytest

from loong_jax.cost.hardware import HARDWARE, hardware


def test_the_issue_names_are_there() -> None:
    assert set(HARDWARE) == {"A800", "A100", "H100", "H200", "v5e", "v5p", "v6e", "tpu7x"}
    assert all(name == record.name for name, record in HARDWARE.items())


@pytest.mark.parametrize("record", HARDWARE.values(), ids=HARDWARE)
def test_magnitudes(record) -> None:  # a slip of a factor of ten in a hand-typed figure
    assert 1e14 < record.flops < 1.3e15
    assert 5e11 < record.hbm_bytes_per_s < 6e12
    assert 1e10 < record.hbm_bytes < 2e11
    assert 4e10 < record.link_bytes_per_s < 5e11
    assert 5e-7 < record.link_latency_s < 2e-5
    assert 100 < record.flops / record.hbm_bytes_per_s < 600  # FLOP per byte, of all accelerators of these years
    assert record.topology in ("switch", "torus")


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"hardware: 'A8000' is none of A800, .*tpu7x"):
        hardware("A8000")
