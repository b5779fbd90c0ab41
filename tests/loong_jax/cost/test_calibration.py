"""What the model predicts of batches it has not seen: the bounds the project set itself (prefill leave-one-out mean
<= 2% and max <= 8%, decode leave-one-shape-out mean <= 10%, at most 32 batches)."""

from __future__ import annotations

import pytest

from loong_jax.cost import calibration, fit
from loong_jax.cost.measured_a800 import FIGURE_3, NUM_BATCHES, SMALL


def sizes(errors: list[float]) -> tuple[float, float]:
    return sum(map(abs, errors)) / len(errors), max(map(abs, errors))


def left_out_prefill(groups: list[object]) -> list[float]:
    measured = [*FIGURE_3, *SMALL]
    rows, seconds = [calibration.prefill_features(m) for m in measured], [m.prefill_ms / 1e3 for m in measured]
    return fit.leave_out(rows, seconds, [*groups, *[None] * len(SMALL)])[: len(FIGURE_3)]


def test_few_batches() -> None:
    assert NUM_BATCHES <= 32


def test_prefill_of_a_batch_left_out() -> None:
    mean, largest = sizes(left_out_prefill(list(range(len(FIGURE_3)))))
    assert mean <= 0.02
    assert largest <= 0.08


def test_prefill_of_a_whole_configuration_left_out() -> None:
    """What DoPs that nobody measured rest on."""
    mean, largest = sizes(left_out_prefill([(m.sp, m.tp) for m in FIGURE_3]))
    assert mean <= 0.03
    assert largest <= 0.08


def test_decode_of_a_shape_left_out() -> None:
    errors: list[float] = []
    for shape in dict.fromkeys((m.batch, m.length) for m in FIGURE_3):
        seen = calibration.fit_efficiency([m for m in FIGURE_3 if (m.batch, m.length) != shape])
        for m in FIGURE_3:
            if (m.batch, m.length) == shape:
                errors.append(calibration.decode_predicted_s(seen, m) * 1e3 / m.decode_ms - 1)
    assert sizes(errors)[0] <= 0.10


def test_several_masters_pay_off_where_rows_are_many() -> None:
    """Figure 14b, within what was read off it and the model's error."""
    e = calibration.a800()

    def ratio(batch: int, length: int, masters: int) -> float:
        ideal = calibration.roofline(2)
        several = ideal.decode_s(e, 4, batch, -(-batch // masters), batch * length / 4)
        return several / ideal.decode_s(e, 4, batch, batch, batch * length / 4)

    assert ratio(1024, 10, 4) == pytest.approx(0.46, abs=0.05)
    assert ratio(256, 100, 2) == pytest.approx(0.84, abs=0.05)
    assert ratio(64, 1000, 4) > 0.9


def test_nothing_is_faster_than_the_peak() -> None:
    e = calibration.a800()
    for field in ("prefill_linear", "prefill_attention", "prefill_link", "decode_weights", "decode_kv", "decode_rows"):
        assert 1.0 <= getattr(e, field) < 2.0, field
