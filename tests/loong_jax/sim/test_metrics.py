"""Latencies, attainment and goodput on outcomes written by hand."""

import numpy as np
import pytest

from loong_jax.sim import Outcome, Slo
from loong_jax.sim.metrics import meets, p90_goodput, quantile, summarise, tpot_s, ttft_s

SLO = Slo(lambda prompt_len: prompt_len * 1e-3, ttft_factor=25.0, ttft_floor_s=15.0, tpot_s=0.05)


def outcome(ttft: float, tpot: float, *, prompt: int = 100, emitted: int = 11, at: float = 0.0) -> Outcome:
    first = at + ttft
    last = first + tpot * (emitted - 1)
    return Outcome(
        0, prompt, emitted, round(at * 1e6), round(first * 1e6), round(last * 1e6), emitted, "finished"
    )  # fmt: skip


def test_latencies() -> None:
    made = outcome(2.0, 0.03, at=5.0)
    assert (ttft_s(made), tpot_s(made)) == (pytest.approx(2.0), pytest.approx(0.03))
    assert tpot_s(outcome(1.0, 0.0, emitted=1)) == 0


@pytest.mark.parametrize(
    ("made", "met"),
    [
        (outcome(14.9, 0.049), True),
        (outcome(15.1, 0.049), False),
        (outcome(14.9, 0.051), False),
        (outcome(24.9, 0.01, prompt=1000), True),  # 25 times one second
        (outcome(25.1, 0.01, prompt=1000), False),
    ],
)
def test_slo_of_the_paper(made: Outcome, met: bool) -> None:
    assert meets(made, SLO) is met


def test_summary_by_decile() -> None:
    """Of 20 requests the two longest miss, and one is not finished."""
    made = [outcome(1.0, 0.01, prompt=10 * (i + 1), at=float(i)) for i in range(17)]
    made += [outcome(99.0, 0.01, prompt=1000 + i, at=17.0 + i) for i in range(2)]
    made.append(Outcome(0, 5000, 3, 20_000_000))
    summary = summarise(made, SLO)
    assert (summary.finished, summary.unfinished) == (19, 1)
    assert summary.slo_attainment == pytest.approx(17 / 20)
    assert summary.attainment_by_decile == pytest.approx([1] * 8 + [0.5, 0.0])
    assert summary.rate == pytest.approx(1.0)
    assert summary.goodput == pytest.approx(17 / 20)
    assert summary.ttft_s.max == pytest.approx(99.0)
    assert summary.normalised_input_s > summarise(made[:17], SLO).normalised_input_s


def test_nothing_is_a_summary_too() -> None:
    assert summarise([], SLO).slo_attainment == 0


def test_quantiles_are_numpys() -> None:
    values = sorted(np.random.default_rng(0).normal(size=37).tolist())
    for q in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))


def test_p90_goodput_is_where_the_curve_falls_below() -> None:
    assert p90_goodput([(1.0, 1.0), (2.0, 0.95), (3.0, 0.75)]) == pytest.approx(2.25)
    assert p90_goodput([(1.0, 0.8), (2.0, 0.5)]) == 0
    assert p90_goodput([(1.0, 0.99), (2.0, 0.95)]) == 2.0
