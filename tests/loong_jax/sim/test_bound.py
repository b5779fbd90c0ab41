"""The fluid bound gives the numbers known for the paper's machine."""

import pytest

from loong_jax.sim.bound import fluid_bound, marginal_prefill_s
from loong_jax.types import ContextForm
from tests.support.simulated import RoundTimes


class Fig3(RoundTimes):
    """The paper's figure 3, SP4TP2: seconds for n tokens are B n + C n^2, and half as many pairs as n^2."""

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        assert dop == 4
        return 0.078 + 1.008e-5 * tokens + 1.939e-10 * 2 * pairs


@pytest.mark.parametrize(("exponent", "rate"), [(1.0, 1.69), (1.2, 4.63), (1.4, 16.0)])
def test_zipf_bounds(exponent: float, rate: float) -> None:
    """Exactly over the distribution, not over a sample: the mean of the squares is in its tail."""
    lengths = range(10, 200_000)
    weights = [length**-exponent for length in lengths]
    seconds = [marginal_prefill_s(Fig3(), 4, length) for length in lengths]
    bound = sum(weights) / sum(w * s for w, s in zip(weights, seconds, strict=True))
    assert bound == pytest.approx(rate, rel=0.005)


def test_each_request_takes_its_cheapest_group() -> None:
    """RoundTimes divides perfectly: all degrees cost the same, and four instances do four times the work of one."""
    assert fluid_bound([1000, 3000], RoundTimes(), 4, (1, 2, 4)) == pytest.approx(200.0)

    class Wasteful(RoundTimes):
        def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
            return 1e-5 * tokens / dop * (1 + 0.1 * (dop - 1))

    assert fluid_bound([1000, 3000], Wasteful(), 4, (1, 2, 4)) == pytest.approx(200.0)
    assert fluid_bound([1000, 3000], Wasteful(), 4, (4,)) == pytest.approx(200.0 / 1.3)
