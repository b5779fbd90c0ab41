"""Predicted against measured: a step's time is that of its instances, windows are bounded, refits are events."""

from __future__ import annotations

import pytest

from loong_jax.cost.unmeasured import unmeasured
from loong_jax.types import (
    AnyCommand,
    ContextForm,
    CostUpdated,
    DecodeRow,
    Migrate,
    Phase,
    PrefillRow,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    StepDone,
    StepFailed,
)
from serving.step_times import REFIT_US, SAMPLE_US, WINDOW, StepTimes

COST = unmeasured()
KV = {1: {0: 100, 1: 50}, 2: {0: 30}}


def prefill(step: int, instances: tuple[int, ...] = (0, 1), num_tokens: int = 1000) -> RunPrefill:
    row = PrefillRow(1, 0, (Run(0, num_tokens),), b"", (), (), True, Sampling())
    return RunPrefill(step, instances, 1024, ContextForm.RING, (row,))


def decode(step: int, instances: tuple[int, ...] = (0, 1)) -> RunDecode:
    rows = tuple(DecodeRow(r, r, 1, -1, 0, 0, Run(0, 1), Sampling()) for r in (1, 2))
    return RunDecode(step, instances, 8, rows)


def prefill_us(num_tokens: int = 1000) -> int:
    return round(1e6 * COST.prefill_s(2, num_tokens, num_tokens**2 / 2, 0, ContextForm.RING))


class Tape:
    def __init__(self) -> None:
        self.times = StepTimes(COST, lambda request: KV[request], 2)

    def issue(self, command: AnyCommand, at_us: int) -> None:
        self.times.saw_command(command, at_us)

    def done(self, step: int, at_us: int) -> None:
        self.times.saw_event(StepDone(step), at_us)


@pytest.fixture
def tape() -> Tape:
    return Tape()


def test_a_step_alone_is_timed_from_its_issue(tape: Tape) -> None:
    tape.issue(prefill(0), 5000)
    tape.done(0, 5000 + 2 * prefill_us())
    assert tape.times.phase_errors() == [
        (Phase.PREFILL, 1, pytest.approx(0.5, abs=1e-3), pytest.approx(-0.5, abs=1e-3))
    ]


def test_a_queued_step_is_timed_from_the_end_of_the_one_before(tape: Tape) -> None:
    tape.issue(prefill(0), 0)
    tape.issue(prefill(1), 10)  # queued
    tape.done(0, 50_000)
    tape.done(1, 50_000 + prefill_us())
    seen = tape.times.phase_errors()[0]
    first = COST.prefill_s(2, 1000, 5e5, 0, ContextForm.RING) / 0.05 - 1
    assert seen.bias == pytest.approx((first + 0) / 2, abs=1e-3)


def test_other_steps_keep_instances_busy_too(tape: Tape) -> None:
    tape.issue(Migrate(0, (0, 1), ()), 0)
    tape.issue(prefill(1), 10)
    tape.done(0, 90_000)
    tape.done(1, 90_000 + prefill_us())
    assert tape.times.phase_errors()[0].error == pytest.approx(0, abs=1e-3)


def test_decode_steps_are_compared_now_and_then(tape: Tape) -> None:
    seconds = COST.decode_s(2, 2, 2, 130)
    now_us = 0
    for step in range(100):
        tape.issue(decode(step), now_us)
        now_us += round(1e6 * seconds)
        tape.done(step, now_us)
    seen = tape.times.phase_errors()[0]
    assert (seen.phase, seen.error) == (Phase.DECODE, pytest.approx(0, abs=1e-3))
    assert 1 < seen.num_steps <= 1 + now_us // SAMPLE_US


def test_failed_and_unknown_steps_are_forgotten(tape: Tape) -> None:
    tape.issue(prefill(0), 0)
    tape.times.saw_event(StepFailed(0, (0, 1), "x"), 10)
    tape.done(0, 20)
    tape.done(99, 30)
    assert tape.times.phase_errors() == []


def slow_prefills(tape: Tape, num: int, first: int = 0) -> int:
    now_us = first * 1_000_000
    for step in range(first, first + num):
        tape.issue(prefill(step, num_tokens=500 + 100 * (step % 7)), now_us)
        now_us += 1_000_000
        taken_us = 4 * prefill_us(500 + 100 * (step % 7))
        tape.done(step, now_us - 1_000_000 + taken_us)
    return now_us


def test_windows_are_bounded(tape: Tape) -> None:
    slow_prefills(tape, 3 * WINDOW)
    assert tape.times.phase_errors()[0].num_steps == WINDOW


def test_a_refit_is_an_event_and_comes_rarely(tape: Tape) -> None:
    now_us = slow_prefills(tape, 31)
    assert now_us > REFIT_US
    assert tape.times.cost_update(REFIT_US - 1) is None
    update = tape.times.cost_update(now_us)
    assert isinstance(update, CostUpdated)
    assert tape.times.cost is COST  # until the event comes by
    tape.times.saw_event(update, now_us)
    expected_us = 4 * prefill_us()
    assert tape.times.cost.prefill_s(2, 1000, 5e5, 0, ContextForm.RING) == pytest.approx(expected_us / 1e6, rel=0.05)
    assert tape.times.num_refits == 1
    for step in range(40, 60):  # off again, and at once
        tape.issue(prefill(step), now_us)
        tape.done(step, now_us + 1000)
        now_us += 1000
    assert tape.times.cost_update(now_us) is None
    assert tape.times.cost_update(now_us + REFIT_US) is not None


def test_what_fits_is_left_alone(tape: Tape) -> None:
    update = tape.times.cost_update(slow_prefills(tape, 31))
    assert update is not None
    tape.times.saw_event(update, 0)
    assert tape.times.cost_update(100_000_000) is None  # nothing new was seen
    slow_prefills(tape, 64, first=200)
    assert tape.times.cost_update(400_000_000) is None


def test_few_steps_make_no_refit(tape: Tape) -> None:
    slow_prefills(tape, 3)
    assert tape.times.cost_update(2 * REFIT_US) is None


def test_large_steps_are_compared_less_often() -> None:
    def compared(num_rows: int) -> int:
        times = StepTimes(COST, lambda request: {0: 9}, 2)
        rows = tuple(DecodeRow(r, r, 1, -1, 0, 0, Run(0, 1), Sampling()) for r in range(num_rows))
        for step in range(60):
            times.saw_command(RunDecode(step, (0, 1), 512, rows), step * SAMPLE_US)
            times.saw_event(StepDone(step), step * SAMPLE_US + 50_000)
        return times.phase_errors()[0].num_steps

    assert compared(8) == 60
    assert compared(512) == 15


def test_comparing_alone_changes_nothing() -> None:
    tape = Tape()
    tape.times = StepTimes(COST, lambda request: KV[request], 2, refit=False)
    now_us = slow_prefills(tape, 31)
    assert tape.times.cost_update(now_us) is None
    assert tape.times.phase_errors()[0].error > 0.5
