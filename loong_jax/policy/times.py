"""Predicted step times as the elastic policy asks for them: the better form of context, chunks of a given time.

What it is: arithmetic over a cost model, remembered for as long as the model stays the same.
What it is not: a cost model (`loong_jax/cost/`), or a choice.
"""

from __future__ import annotations

from loong_jax.config import ClusterConfig
from loong_jax.cost import CostModel, row_pairs
from loong_jax.types import ContextForm

_CONTEXT_STEP = 4096
_BUDGET_STEPS_PER_S = 200


class Times:
    def __init__(self, cluster: ClusterConfig, cost: CostModel) -> None:
        self.cost = cost
        self.dops = cluster.ladder.dops
        self._page_tokens = cluster.page_tokens
        self._alone: dict[tuple[int, int], float] = {}
        self._chunks: dict[tuple[int, int, int, int], int] = {}
        self.base_s = cost.prefill_s(1, 1, 1.0, 0, ContextForm.RING)

    def step_s(self, dop: int, tokens: float, pairs: float, context: float) -> float:
        """Of a prefill step, in its better form."""
        return self.form(dop, int(tokens), pairs, int(context))[1]

    def form(self, dop: int, tokens: int, pairs: float, context: int) -> tuple[ContextForm, float]:
        """How to attend to `context` resident tokens, and the seconds of the step."""
        ring_s = self.cost.prefill_s(dop, tokens, pairs, context, ContextForm.RING)
        if not context:
            return ContextForm.RING, ring_s
        gather_s = self.cost.prefill_s(dop, tokens, pairs, context, ContextForm.GATHER_Q)
        return (ContextForm.GATHER_Q, gather_s) if gather_s < ring_s else (ContextForm.RING, ring_s)

    def alone_s(self, tokens: int, resident: int) -> float:
        """Of all that is missing, in one step on the group that suits it best."""
        found = self._alone.get((tokens, resident))
        if found is None:
            if len(self._alone) > 1 << 16:
                self._alone.clear()
            pairs = row_pairs(tokens, resident)
            found = min(self.step_s(dop, tokens, pairs, resident) for dop in (self.dops[0], self.dops[-1]))
            self._alone[tokens, resident] = found
        return found

    def chunk_tokens(self, dop: int, resident: int, budget_s: float, most: int) -> int:
        """The most tokens, in whole pages and at least one page, whose step stays within `budget_s`; `most` at most."""
        if most <= self._page_tokens or self._within(dop, most, resident, budget_s):
            return most
        key = (dop, resident // _CONTEXT_STEP, int(budget_s * _BUDGET_STEPS_PER_S), most // _CONTEXT_STEP)
        pages = self._chunks.get(key)
        if pages is None:
            low, high = 1, most // self._page_tokens
            while low < high:
                middle = (low + high + 1) // 2
                if self._within(dop, middle * self._page_tokens, resident, budget_s):
                    low = middle
                else:
                    high = middle - 1
            pages = self._chunks[key] = low
            if len(self._chunks) > 1 << 16:
                self._chunks.clear()
        return min(most, pages * self._page_tokens)

    def _within(self, dop: int, tokens: int, resident: int, budget_s: float) -> bool:
        return self.step_s(dop, tokens, row_pairs(tokens, resident), resident) <= budget_s
