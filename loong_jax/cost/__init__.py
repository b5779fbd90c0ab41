"""Cost models: predicted seconds of a step, from coefficients that are data (DESIGN 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

from loong_jax.types import ContextForm


class CostModel(Protocol):
    """Pure arithmetic; `updated` gives a new model, so a model is a value that can be logged."""

    coefficients: Mapping[str, float]

    def prefill_s(self, dop: int, tokens: int, context: int, form: ContextForm) -> float:
        """Predicted seconds of a prefill step of `tokens` new tokens over `context` resident ones."""
        ...

    def decode_s(self, dop: int, rows: int, kv_tokens: int) -> float:
        """Predicted seconds of a decode step: `rows` in all, `kv_tokens` on the fullest instance."""
        ...

    def updated(self, coefficients: Mapping[str, float]) -> Self: ...
