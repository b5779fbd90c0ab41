"""The cost model of an engine that nobody has profiled: the right shape, and no claim to numbers.

It makes large prompts spread and small ones stay together, until `loong profile` or the live engine's own measurements
replace it. What it is not: a roofline of a named device (`presets.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loong_jax.config import LadderConfig
from loong_jax.cost.fitted import FittedCost

DEFAULTS: Mapping[str, float] = MappingProxyType(
    {
        "prefill_base_s": 2e-3,  # launch, weights
        "prefill_hop_s": 5e-4,  # each instance that joins the ring
        "prefill_token_s": 2e-5,  # linear layers, per token of an instance
        "prefill_pair_s": 2e-9,  # attention, per (query, key) pair of an instance
        "ring_token_s": 5e-7,  # one token of KV over one link
        "gather_token_s": 1e-6,  # q and partials of one token over one link
        "decode_base_s": 2e-3,
        "decode_hop_s": 3e-4,  # each instance that joins the exchange
        "decode_row_s": 2e-5,  # linear layers, per row of the fullest master
        "decode_exchange_row_s": 2e-6,
        "decode_kv_token_s": 1e-8,
        "migrate_base_s": 1e-3,
        "migrate_token_s": 1e-6,
    }
)

_FAR = 1 << 20
"""Everything here is linear in the DoP or in its inverse, so two DoPs say it of all between them."""


def unmeasured(ladder: LadderConfig | None = None, **changed: float) -> FittedCost:
    """`changed`: other values of DEFAULTS. Raises ValueError for an unknown name."""
    unknown = sorted(set(changed) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"unknown cost coefficients: {', '.join(unknown)}")
    given = {**DEFAULTS, **changed}
    coefficients = {name: given[name] for name in ("migrate_base_s", "migrate_token_s")}
    for dop in (1, _FAR):
        coefficients.update({f"{name}.{dop}": value for name, value in _of_dop(given, dop).items()})
    return FittedCost(coefficients, ladder)


def _of_dop(given: Mapping[str, float], dop: int) -> dict[str, float]:
    share = (dop - 1) / dop
    return {
        "prefill_base_s": given["prefill_base_s"] + given["prefill_hop_s"] * (dop - 1),
        "prefill_weights_s": 0.0,
        "prefill_token_s": given["prefill_token_s"] / dop + given["ring_token_s"] * share,
        "prefill_pair_s": given["prefill_pair_s"] / dop,
        "prefill_context_token_s": 0.0,
        "prefill_ring_token_s": given["ring_token_s"] * share,
        "prefill_gather_token_s": given["gather_token_s"] * share,
        "decode_base_s": given["decode_base_s"] + given["decode_hop_s"] * (dop - 1),
        "decode_masters_s": 0.0,
        "decode_master_row_s": given["decode_row_s"],
        "decode_row_s": given["decode_exchange_row_s"] * share,
        "decode_kv_token_s": given["decode_kv_token_s"],
    }
