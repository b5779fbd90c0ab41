"""When the requests of a benchmark are sent.

Gaps are gamma distributed, as in `vllm bench serve`: a burstiness of 1 is a Poisson process, below it requests come in
bursts, above it evenly. What it is not: the wait for a free place among the most at once (`serving/bench/runner.py`).
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from loong_jax.config import ConfigError

RAMPS = ("linear", "exponential")


class Ramp(NamedTuple):
    """From one rate to another over a run, in requests per second."""

    strategy: str
    start_rps: float
    end_rps: float

    def at(self, share: float) -> float:
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * share
        return self.start_rps * (self.end_rps / self.start_rps) ** share


def ramp_of(strategy: str | None, start_rps: float | None, end_rps: float | None) -> Ramp | None:
    """Raises ConfigError."""
    if strategy is None:
        if start_rps is not None or end_rps is not None:
            raise ConfigError("ramp-up-strategy: needed with ramp-up-start-rps and ramp-up-end-rps")
        return None
    if strategy not in RAMPS:
        raise ConfigError(f"ramp-up-strategy: {strategy!r} is none of {', '.join(RAMPS)}")
    if start_rps is None or end_rps is None or not (0 < start_rps < math.inf and 0 < end_rps < math.inf):
        raise ConfigError("ramp-up-start-rps, ramp-up-end-rps: both are needed, and positive")
    return Ramp(strategy, start_rps, end_rps)


def arrival_times_s(num: int, rate: float, burstiness: float, ramp: Ramp | None, seed: int) -> list[float]:
    """When each of `num` requests is sent, from 0 s. With an infinite rate all at once. At a constant rate the whole
    takes num / rate, whatever was drawn. Raises ConfigError."""
    if not rate > 0:
        raise ConfigError(f"request-rate: {rate:g} is not positive; inf sends everything at once")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness: {burstiness:g} is not positive and finite")
    if ramp is None and math.isinf(rate):
        return [0.0] * num
    rng = random.Random(seed)
    times, now_s = [], 0.0
    for index in range(num):
        here = rate if ramp is None else ramp.at(index / max(1, num - 1))
        times.append(now_s)
        now_s += rng.gammavariate(burstiness, 1.0 / (here * burstiness))
    if ramp is None and times[-1] > 0:
        scale = (num - 1) / rate / times[-1]
        times = [scale * time_s for time_s in times]
    return times
