"""The fluid bound: no scheduler serves a higher rate for long, whatever it knows.

Work-conserving and decode-free: every instance computes prefill all the time, requests are infinitely divisible, a
batch is so large that its fixed cost vanishes, and decoding costs nothing. So the rate is one over the mean marginal
prefill time of a request.
What it is not: a bound of what may be met for a while, or under a latency SLO.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loong_jax.cost import CostModel, row_pairs
from loong_jax.types import ContextForm

_COPIES = 1 << 20
"""Requests of a batch large enough that its fixed cost does not count."""


def marginal_prefill_s(cost: CostModel, dop: int, prompt_len: int) -> float:
    """Seconds that one more prompt adds to a very large batch on a group of `dop`."""
    tokens, pairs = _COPIES * prompt_len, _COPIES * row_pairs(prompt_len, 0)
    return cost.prefill_s(dop, tokens, pairs, 0, ContextForm.RING) / _COPIES


def fluid_bound(prompt_lens: Sequence[int], cost: CostModel, num_instances: int, dops: Iterable[int]) -> float:
    """Requests per second of `num_instances` instances, where each request takes the DoP of `dops` that costs it the
    fewest instance-seconds. With the largest DoP alone, all on the whole group, it is the bound of goals and paper."""
    choices = tuple(dops)
    seconds: dict[int, float] = {}
    for length in prompt_lens:
        if length not in seconds:
            seconds[length] = min(dop * marginal_prefill_s(cost, dop, length) for dop in choices) / num_instances
    return len(prompt_lens) / sum(seconds[length] for length in prompt_lens)
