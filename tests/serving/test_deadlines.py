"""What is refused could not have been in time, by the cost model; what might be is not."""

import pytest

from loong_jax.cost.fitted import GLOBAL, PER_DOP, FittedCost
from serving.deadlines import Deadlines
from serving.errors import ShortDeadline


def cost(**seconds: float) -> FittedCost:
    """Of DoP 1 and 4; prefill of DoP 4 takes a quarter of the time per token."""
    coefficients = {**dict.fromkeys(GLOBAL, 0.0), **{f"{name}.{dop}": 0.0 for name in PER_DOP for dop in (1, 4)}}
    return FittedCost(coefficients | {name.replace("__", "."): value for name, value in seconds.items()})


COST = cost(prefill_token_s__1=0.01, prefill_token_s__4=0.0025, decode_base_s__1=0.1, decode_base_s__4=0.2)


def test_the_least_time_is_that_of_the_best_group():
    deadlines = Deadlines(COST, (1, 4))
    assert deadlines.least_s(1000, 1) == pytest.approx(2.5)
    assert deadlines.least_s(1000, 11) == pytest.approx(2.5 + 10 * 0.1)
    assert Deadlines(COST, (1,)).least_s(1000, 1) == pytest.approx(10)


def test_only_what_cannot_be_in_time_is_refused():
    deadlines = Deadlines(COST, (1, 4))
    for left_s in (2.0, 2.5, 100.0):
        deadlines.check(left_s, 1000, 1)
    with pytest.raises(ShortDeadline, match=r"deadline: 1\.9 s are left, and 1000 \+ 1 tokens take at least 2\.5 s"):
        deadlines.check(1.9, 1000, 1)
    with pytest.raises(ShortDeadline, match="deadline: 0 s"):
        deadlines.check(-1.0, 1000, 1)
