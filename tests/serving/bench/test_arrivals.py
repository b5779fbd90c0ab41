"""Gaps by rate, burstiness and ramp."""

import math
import statistics

import pytest

from loong_jax.config import ConfigError
from serving.bench.arrivals import Ramp, arrival_times_s, ramp_of


def gaps(times):
    return [b - a for a, b in zip(times, times[1:], strict=False)]


def test_everything_at_once():
    assert arrival_times_s(3, math.inf, 1.0, None, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("burstiness", "low", "high"), [(0.25, 1.7, 2.3), (1.0, 0.9, 1.1), (16.0, 0.2, 0.3)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness, low, high):
    found = gaps(arrival_times_s(4001, 5.0, burstiness, None, 1))
    assert sum(found) == pytest.approx(4000 / 5.0)
    assert low < statistics.pstdev(found) / statistics.mean(found) < high  # 1 / sqrt(burstiness)
    assert min(found) >= 0


def test_the_seed_decides():
    assert arrival_times_s(9, 1.0, 1.0, None, 1) == arrival_times_s(9, 1.0, 1.0, None, 1)
    assert arrival_times_s(9, 1.0, 1.0, None, 1) != arrival_times_s(9, 1.0, 1.0, None, 2)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy):
    found = gaps(arrival_times_s(4000, math.inf, 1.0, ramp_of(strategy, 1.0, 16.0), 1))
    assert statistics.mean(found[:100]) == pytest.approx(1.0, rel=0.35)
    assert statistics.mean(found[-100:]) == pytest.approx(1 / 16, rel=0.35)
    assert Ramp(strategy, 1.0, 16.0).at(0.5) == (8.5 if strategy == "linear" else 4.0)


def test_one_request():
    assert arrival_times_s(1, 2.0, 1.0, None, 0) == [0.0]


@pytest.mark.parametrize(("rate", "burstiness", "field"), [(0, 1, "request-rate"), (-1, 1, "request-rate"),
    (math.nan, 1, "request-rate"), (1, 0, "burstiness"), (1, math.inf, "burstiness"),
    (1, math.nan, "burstiness")])  # fmt: skip
def test_rates_that_make_no_sense(rate, burstiness, field):
    with pytest.raises(ConfigError, match=field):
        arrival_times_s(3, rate, burstiness, None, 0)


@pytest.mark.parametrize("ramp", [("x", 1.0, 2.0), ("linear", None, 2.0), ("linear", 0.0, 2.0), (None, 1.0, None),
    ("exponential", 1.0, math.inf), ("linear", math.nan, 1.0)])  # fmt: skip
def test_ramps_that_make_no_sense(ramp):
    with pytest.raises(ConfigError, match="ramp-up-"):
        ramp_of(*ramp)
