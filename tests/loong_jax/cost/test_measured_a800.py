"""The hand-typed table of measurements holds together."""

from __future__ import annotations

from loong_jax.cost.measured_a800 import FIGURE_3, FIGURE_14B, SMALL


def test_every_shape_was_measured_in_every_configuration() -> None:
    configurations = {(m.sp, m.tp) for m in FIGURE_3}
    assert configurations == {(1, 8), (2, 4), (4, 2)}
    shapes = {(m.batch, m.length) for m in FIGURE_3}
    assert {(m.sp, m.tp, m.batch, m.length) for m in FIGURE_3} == {(*c, *s) for c in configurations for s in shapes}
    assert len(FIGURE_3) == 18


def test_masters_are_of_the_group_and_have_rows() -> None:
    for m in (*FIGURE_3, *SMALL):
        assert 1 <= m.masters <= min(m.sp, m.batch)
    assert all(1 < m.masters <= 4 and 0.3 < m.ratio < 1.2 for m in FIGURE_14B)


def test_prefill_takes_longer_than_decode() -> None:
    assert all(m.prefill_ms > m.decode_ms > 5 for m in (*FIGURE_3, *SMALL))
