"""Predicted against measured step times of the live engine: the error for operators, and refits of the cost model.

A step is timed from when its instances were free for it (it was issued, or the step before it was done) to its
completion as the loop sees it. Every prefill is compared, and a decode step of each DoP now and then: counting what it
reads costs a look at every row. Windows are bounded, and a refit is tried at most once in `REFIT_US`; it becomes a
`CostUpdated` event like any other, so that the log replays. Lives in the engine thread.
What it is not: the arithmetic of a refit (`loong_jax/cost/refit.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.refit import MIN_STEPS, Timed, errors, refitted
from loong_jax.cost.work import DecodeWork, KvTokens, PrefillWork, decode_work, prefill_work
from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    CopyPages,
    CostUpdated,
    Migrate,
    Phase,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
)

REFIT_US = 30_000_000
SAMPLE_US = 100_000
"""Between two decode steps of one DoP that are compared; more where a comparison costs more."""
LOOKS = 256
"""Rows times instances that a comparison of each SAMPLE_US may look at."""
WINDOW = 64
"""Steps of one phase and DoP that are remembered."""
GOOD_ERROR = 0.05
"""Mean size of the error that is left alone."""

_log = logging.getLogger(__name__)


class PhaseError(NamedTuple):
    """Over the remembered steps of a phase: mean size of the relative error, and its mean (positive: predicted too
    long)."""

    phase: Phase
    num_steps: int
    error: float
    bias: float


class _InFlight(NamedTuple):
    issued_us: int
    instances: tuple[int, ...]
    work: PrefillWork | DecodeWork | None


class StepTimes:
    """`cost`: what the manager starts with; it follows the manager's by the same events. `kv_tokens`: the ledger's.
    `refit`: whether to correct it, or only to compare."""

    def __init__(
        self, cost: FittedCost, kv_tokens: KvTokens, num_instances: int, refit_us: int = REFIT_US, refit: bool = True
    ) -> None:
        self.cost = cost
        self.num_refits = 0
        self._refit = refit
        self._kv_tokens = kv_tokens
        self._in_flight: dict[int, _InFlight] = {}
        self._free_us = [0] * num_instances  # when the newest completed step of each left it
        self._next_sample_us: dict[int, int] = {}  # of each DoP: when a decode step is compared again
        self._windows: dict[tuple[Phase, int], deque[tuple[PrefillWork | DecodeWork, float, float]]] = {}
        self._fresh: dict[tuple[Phase, int], int] = {}  # steps since the last refit
        self._refit_us = self._next_refit_us = refit_us

    # ---- the tape

    def saw_command(self, command: AnyCommand, now_us: int) -> None:
        if isinstance(command, RunDecode):
            work = None
            dop = len(command.instances)
            if now_us >= self._next_sample_us.get(dop, 0):
                self._next_sample_us[dop] = now_us + SAMPLE_US * max(1, len(command.rows) * dop // LOOKS)
                work = decode_work(command, self._kv_tokens)
            self._in_flight[command.step] = _InFlight(now_us, command.instances, work)
        elif isinstance(command, RunPrefill):
            self._in_flight[command.step] = _InFlight(now_us, command.instances, prefill_work(command))
        elif isinstance(command, Migrate):
            self._in_flight[command.step] = _InFlight(now_us, command.instances, None)
        elif isinstance(command, CopyPages):
            self._in_flight[command.step] = _InFlight(now_us, (command.instance,), None)

    def saw_event(self, event: AnyEvent, now_us: int) -> None:
        if isinstance(event, StepDone):
            step = self._in_flight.pop(event.step, None)
            if step is not None:
                self._done(step, now_us)
        elif isinstance(event, StepFailed):
            self._in_flight.pop(event.step, None)
        elif isinstance(event, CostUpdated):
            self.cost = self.cost.updated(event.coefficients)

    def _done(self, step: _InFlight, now_us: int) -> None:
        free = self._free_us
        start_us = step.issued_us
        for instance in step.instances:
            if free[instance] > start_us:
                start_us = free[instance]
            free[instance] = now_us
        if step.work is None or now_us <= start_us:
            return
        phase = Phase.DECODE if isinstance(step.work, DecodeWork) else Phase.PREFILL
        key = (phase, step.work.dop)
        window = self._windows.setdefault(key, deque(maxlen=WINDOW))
        seconds = (now_us - start_us) / 1e6
        window.append((step.work, seconds, errors(self.cost, [(step.work, seconds)])[0]))
        self._fresh[key] = self._fresh.get(key, 0) + 1

    # ---- what follows

    def phase_errors(self) -> list[PhaseError]:
        """Of predictions as they were made."""
        out: list[PhaseError] = []
        for phase in (Phase.PREFILL, Phase.DECODE):
            seen = [error for (of, _), window in self._windows.items() if of is phase for _, _, error in window]
            if seen:
                out.append(PhaseError(phase, len(seen), _mean_size(seen), sum(seen) / len(seen)))
        return out

    def cost_update(self, now_us: int) -> CostUpdated | None:
        """New coefficients, where predictions were off; asked after every event, answered rarely."""
        if now_us < self._next_refit_us:
            return None
        self._next_refit_us = now_us + self._refit_us
        off: list[list[Timed]] = []
        for key, window in self._windows.items():
            if self._fresh.get(key, 0) >= MIN_STEPS:
                self._fresh[key] = 0
                steps = [(work, seconds) for work, seconds, _ in window]
                if _mean_size(errors(self.cost, steps)) > GOOD_ERROR:
                    off.append(steps)
        coefficients = refitted(self.cost, off) if self._refit else {}
        for error in self.phase_errors():
            _log.info(
                "%s steps take what was predicted within %.1f%% (mean of %d; %+.1f%% in the mean)",
                error.phase, 100 * error.error, error.num_steps, 100 * error.bias,
            )  # fmt: skip
        if not coefficients:
            return None
        self.num_refits += 1
        _log.info("the cost model was refitted: %d coefficients", len(coefficients))
        return CostUpdated(coefficients)


def _mean_size(values: list[float]) -> float:
    return sum(map(abs, values)) / len(values)
