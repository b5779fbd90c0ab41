"""Whether an answer can be there before its deadline, as far as a measured cost model foretells.

What it is not: a promise. It counts the work of the request alone on the group that suits it best, with nobody before
it; what is refused here could not have been in time.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.cost import CostModel, row_pairs
from loong_jax.types import ContextForm
from serving.errors import ShortDeadline

_MARGIN = 0.8
"""Of the predicted time: what is wrong by a fifth refuses nobody."""


class Deadlines:
    """`cost` was measured on this engine, `dops` are those of its ladder."""

    def __init__(self, cost: CostModel, dops: Sequence[int]) -> None:
        self._cost = cost
        self._dops = tuple(dops)

    def least_s(self, num_prompt_tokens: int, num_new_tokens: int) -> float:
        """Predicted seconds of a prompt and so many tokens after it, in one step of prefill and then one of decode for
        each token but the first."""
        pairs = row_pairs(num_prompt_tokens, 0)
        prefill_s = min(self._cost.prefill_s(dop, num_prompt_tokens, pairs, 0, ContextForm.RING) for dop in self._dops)
        if num_new_tokens <= 1:
            return prefill_s
        step_s = min(self._cost.decode_s(dop, 1, 1, num_prompt_tokens) for dop in self._dops)
        return prefill_s + (num_new_tokens - 1) * step_s

    def check(self, left_s: float, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """`num_new_tokens`: that the answer has at least. Raises ShortDeadline."""
        least_s = self.least_s(num_prompt_tokens, num_new_tokens)
        if left_s < _MARGIN * least_s:
            raise ShortDeadline(
                f"deadline: {max(0.0, left_s):.3g} s are left, and {num_prompt_tokens} + {num_new_tokens} tokens take "
                f"at least {least_s:.3g} s"
            )
