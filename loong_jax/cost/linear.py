"""A linear cost model with physical terms: `T = A + B*sum(len) + C*sum(len^2)` per DoP (LoongServe section 5.2).

Coefficients are data and come from calibration (`CostUpdated`) or from the defaults, which only have the right shape:
they make large prompts spread and small ones stay together. What it is not: a roofline of a named device, or a fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from loong_jax.types import ContextForm

DEFAULTS: Mapping[str, float] = MappingProxyType(
    {
        "prefill_base_s": 2e-3,  # A: launch, weights
        "prefill_hop_s": 5e-4,  # A grows with each instance that joins the ring
        "prefill_token_s": 2e-5,  # B: linear layers, per token of an instance
        "prefill_pair_s": 2e-9,  # C: attention, per (q, kv) pair of an instance
        "ring_token_s": 5e-7,  # one token of KV over one link
        "gather_token_s": 1e-6,  # q and partials of one token over one link
        "decode_base_s": 2e-3,  # launch, weights
        "decode_hop_s": 3e-4,  # each instance that joins the exchange
        "decode_row_s": 2e-5,  # linear layers, per row of the fullest master
        "decode_exchange_row_s": 2e-6,  # q and partials of one row over one link
        "decode_kv_token_s": 1e-8,  # one token of KV read by the fullest instance
        "migrate_base_s": 1e-3,
        "migrate_token_s": 1e-6,
    }
)


class LinearCost:
    def __init__(self, coefficients: Mapping[str, float] = DEFAULTS) -> None:
        """Missing names take the defaults; an unknown name is a `ValueError`."""
        unknown = sorted(set(coefficients) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"unknown cost coefficients: {', '.join(unknown)}")
        self.coefficients: Mapping[str, float] = MappingProxyType({**DEFAULTS, **coefficients})

    def updated(self, coefficients: Mapping[str, float]) -> Self:
        return type(self)({**self.coefficients, **coefficients})

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        c = self.coefficients
        math_s = (c["prefill_token_s"] * tokens + c["prefill_pair_s"] * pairs) / dop
        return c["prefill_base_s"] + c["prefill_hop_s"] * (dop - 1) + math_s + self._link_s(dop, tokens, context, form)

    def _link_s(self, dop: int, tokens: int, context: int, form: ContextForm) -> float:
        """New KV always circulates; context circulates too in the ring, q and partials do in gather-q."""
        if dop == 1:
            return 0.0
        c = self.coefficients
        share = (dop - 1) / dop
        own_s = c["ring_token_s"] * tokens * share
        if form is ContextForm.RING:
            return own_s + c["ring_token_s"] * context * share
        return own_s + c["gather_token_s"] * tokens * share

    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float:
        c = self.coefficients
        return (
            c["decode_base_s"]
            + c["decode_hop_s"] * (dop - 1)
            + c["decode_row_s"] * rows_per_master
            + c["decode_exchange_row_s"] * rows * (dop - 1) / dop
            + c["decode_kv_token_s"] * kv_tokens
        )

    def migrate_s(self, tokens: int) -> float:
        return self.coefficients["migrate_base_s"] + self.coefficients["migrate_token_s"] * tokens
