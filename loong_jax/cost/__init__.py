"""Cost models: predicted seconds of a step, from coefficients that are data (DESIGN 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

from loong_jax.types import ContextForm


class CostModel(Protocol):
    """Pure arithmetic; `updated` gives a new model, so a model is a value that can be logged."""

    coefficients: Mapping[str, float]

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        """Predicted seconds of a prefill step: `tokens` new ones in all rows; `pairs` of a query and a key in all rows
        (the sum of `row_pairs`); `context` resident tokens in all rows, which circulate in the ring form."""
        ...

    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float:
        """Predicted seconds of a decode step: `rows` in all, which are exchanged; `rows_per_master` on the fullest
        master; `kv_tokens` on the fullest instance."""
        ...

    def migrate_s(self, tokens: int) -> float:
        """Predicted seconds of moving the KV of `tokens` tokens between two instances."""
        ...

    def updated(self, coefficients: Mapping[str, float]) -> Self:
        """The same model with other coefficients. Raises ValueError for an unknown name."""
        ...


def row_pairs(new: int, resident: int) -> float:
    """Pairs of a query and a key of one prefill row: `new` tokens over each other and over `resident` ones."""
    return new * (new / 2 + resident)
