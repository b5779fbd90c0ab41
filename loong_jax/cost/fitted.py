"""The cost model policies calculate with: linear in tokens, pairs, rows and KV, with coefficients per DoP.

    prefill  base + max(weights, token * tokens) + max(pair * pairs, context_token * context) + context in its form
    decode   base + masters (if several) + master_row * rows_per_master + row * rows + kv_token * kv_tokens
    migrate  base + token * tokens

On a ladder of programs a step takes what its padded bucket takes: `tokens` and `rows_per_master` are rounded up.
That is `A + B sum(len) + C sum(len^2)` of LoongServe section 5.2 with chunks, both forms of context, and the two floors
that memory sets to small batches. Coefficients are named "prefill_token_s.4" for DoP 4. They come from measurements
(`profile.py`), from a roofline (`roofline.linearised`), or both (`presets.py`); units are seconds per thing named.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Self

from loong_jax.config import LadderConfig
from loong_jax.types import ContextForm

PER_STEP = ("prefill_base_s", "prefill_weights_s", "decode_base_s", "decode_masters_s")
"""Between two DoPs these are taken linearly in the DoP; the others, which share work out, in its inverse."""

PER_DOP = (
    "prefill_base_s",
    "prefill_weights_s",
    "prefill_token_s",
    "prefill_pair_s",
    "prefill_context_token_s",
    "prefill_ring_token_s",
    "prefill_gather_token_s",
    "decode_base_s",
    "decode_masters_s",
    "decode_master_row_s",
    "decode_row_s",
    "decode_kv_token_s",
)
GLOBAL = ("migrate_base_s", "migrate_token_s")


class _Prefill(NamedTuple):
    base_s: float
    weights_s: float
    token_s: float
    pair_s: float
    context_token_s: float
    ring_token_s: float
    gather_token_s: float


class _Decode(NamedTuple):
    base_s: float
    masters_s: float
    master_row_s: float
    row_s: float
    kv_token_s: float


class FittedCost:
    """A value: `updated` makes another one. What is asked for a DoP without coefficients lies between its neighbours';
    beyond the largest one it is that one's, so that nothing is promised that was never seen."""

    def __init__(self, coefficients: Mapping[str, float], ladder: LadderConfig | None = None) -> None:
        """`ladder`: that of the engine whose steps are predicted; None where nothing is padded. Raises ValueError for
        an unknown or missing name, and for a value that is negative or not finite."""
        self.coefficients: Mapping[str, float] = MappingProxyType(dict(coefficients))
        self.ladder = ladder
        self._prefill_sizes = ladder.prefill_tokens if ladder is not None else ()
        self._decode_sizes = ladder.decode_rows if ladder is not None else ()
        self._dops = tuple(sorted(check_coefficients(coefficients)))
        self._prefill: dict[int, _Prefill] = {}
        self._decode: dict[int, _Decode] = {}

    @property
    def dops(self) -> tuple[int, ...]:
        """Those with coefficients of their own."""
        return self._dops

    def updated(self, coefficients: Mapping[str, float]) -> Self:
        return type(self)({**self.coefficients, **coefficients}, self.ladder)

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        c = self._prefill.get(dop) or self._prefill_of(dop)
        if self._prefill_sizes:
            tokens = dop * _padded(-(-tokens // dop), self._prefill_sizes)
        seconds = c.base_s + max(c.weights_s, c.token_s * tokens) + max(c.pair_s * pairs, c.context_token_s * context)
        if not context:
            return seconds
        if form is ContextForm.RING:
            return seconds + c.ring_token_s * context
        return seconds + c.gather_token_s * tokens

    def prefill_terms(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> dict[str, float]:
        """What each coefficient is multiplied with in `prefill_s`, by its name without the DoP."""
        c = self._prefill.get(dop) or self._prefill_of(dop)
        if self._prefill_sizes:
            tokens = dop * _padded(-(-tokens // dop), self._prefill_sizes)
        terms = {"prefill_base_s": 1.0}
        if c.weights_s > c.token_s * tokens:
            terms["prefill_weights_s"] = 1.0
        else:
            terms["prefill_token_s"] = float(tokens)
        if c.context_token_s * context > c.pair_s * pairs:
            terms["prefill_context_token_s"] = float(context)
        else:
            terms["prefill_pair_s"] = pairs
        if context and form is ContextForm.RING:
            terms["prefill_ring_token_s"] = float(context)
        elif context:
            terms["prefill_gather_token_s"] = float(tokens)
        return terms

    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float:
        c = self._decode.get(dop) or self._decode_of(dop)
        base_s = c.base_s + c.masters_s if rows_per_master < rows else c.base_s
        if self._decode_sizes:
            rows_per_master = _padded(rows_per_master, self._decode_sizes)
        return base_s + c.master_row_s * rows_per_master + c.row_s * rows + c.kv_token_s * kv_tokens

    def decode_terms(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> dict[str, float]:
        """What each coefficient is multiplied with in `decode_s`, by its name without the DoP."""
        padded = _padded(rows_per_master, self._decode_sizes) if self._decode_sizes else rows_per_master
        return {
            "decode_base_s": 1.0,
            "decode_masters_s": float(rows_per_master < rows),
            "decode_master_row_s": float(padded),
            "decode_row_s": float(rows),
            "decode_kv_token_s": float(kv_tokens),
        }

    def migrate_s(self, tokens: int) -> float:
        return self.coefficients["migrate_base_s"] + self.coefficients["migrate_token_s"] * tokens

    def at(self, name: str, dop: int) -> float:
        """The coefficient `name` (without its DoP) that holds for `dop`."""
        place = bisect_left(self._dops, dop)
        if place == len(self._dops) or self._dops[place] == dop or place == 0:
            return self.coefficients[f"{name}.{self._dops[min(place, len(self._dops) - 1)]}"]
        below, above = self._dops[place - 1], self._dops[place]
        low, high = self.coefficients[f"{name}.{below}"], self.coefficients[f"{name}.{above}"]
        if name in PER_STEP:
            share = (dop - below) / (above - below)
        else:
            share = (1 / below - 1 / dop) / (1 / below - 1 / above)
        return low + (high - low) * share

    def _prefill_of(self, dop: int) -> _Prefill:
        return self._prefill.setdefault(
            dop, _Prefill(*(self.at(f"prefill_{field}", dop) for field in _Prefill._fields))
        )

    def _decode_of(self, dop: int) -> _Decode:
        c = self._decode[dop] = _Decode(*(self.at(f"decode_{field}", dop) for field in _Decode._fields))
        return c


def _padded(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that holds `size`; beyond the largest, where several steps follow each other, itself."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def check_coefficients(coefficients: Mapping[str, float]) -> set[int]:
    """The DoPs they are for. Raises ValueError that names what is wrong."""
    dops: set[int] = set()
    for name, value in coefficients.items():
        base, _, dop = name.partition(".")
        if base in PER_DOP and dop.isdecimal() and int(dop) >= 1 and dop == str(int(dop)):
            dops.add(int(dop))
        elif name not in GLOBAL:
            raise ValueError(f"{name}: no such cost coefficient")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {value} is no finite number of seconds that is not negative")
    if not dops:
        raise ValueError("prefill_base_s: no coefficient for any DoP")
    for name in (*GLOBAL, *(f"{base}.{dop}" for dop in sorted(dops) for base in PER_DOP)):
        if name not in coefficients:
            raise ValueError(f"{name}: missing")
    return dops
