"""Which compiled bucket a step needs: pure arithmetic over the ladder (DESIGN 5, Programs).

What it is: how runs are cut into units and chunks, how units are striped over a group, the smallest bucket that fits.
What it is not: the ladder itself (`config.LadderConfig`) or knowledge of what is READY (`manager.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from loong_jax.config import LadderConfig
from loong_jax.types import Run


def num_units(runs: Iterable[Run], page_tokens: int) -> int:
    """How many units `units(runs, page_tokens)` has."""
    return sum(-(-run.count // page_tokens) for run in runs)


def units(runs: Iterable[Run], page_tokens: int) -> list[Run]:
    """Each run cut from its first position into pieces of at most `page_tokens`; every unit fills one page."""
    return [
        Run(first, min(page_tokens, run.end - first))
        for run in runs
        for first in range(run.first, run.end, page_tokens)
    ]


def take(missing: tuple[Run, ...], num_units: int, page_tokens: int) -> tuple[Run, ...]:
    """The first runs of `missing`, `num_units` units at most; a cut falls on a page boundary where it can."""
    out: list[Run] = []
    for run in missing:
        if num_units <= 0:
            break
        end = min(run.end, run.first + num_units * page_tokens)
        if end < run.end and end - end % page_tokens > run.first:
            end -= end % page_tokens
        out.append(Run(run.first, end - run.first))
        num_units -= -(-(end - run.first) // page_tokens)
    return tuple(out)


def prefill_bucket(num_units: int, dop: int, sizes: tuple[int, ...], page_tokens: int) -> int | None:
    """Tokens per instance of the smallest of `sizes` for `num_units` units striped over `dop` ranks (unit u on rank
    u mod dop, a page of tokens each); None when the largest is too small."""
    return _at_least(-(-num_units // dop) * page_tokens, sizes)


def decode_bucket(max_rows_per_master: int, ladder: LadderConfig) -> int | None:
    """Rows per master of the smallest decode bucket; None when the largest is too small."""
    return _at_least(max_rows_per_master, ladder.decode_rows)


def _at_least(value: int, ascending: tuple[int, ...]) -> int | None:
    index = bisect_left(ascending, value)
    return ascending[index] if index < len(ascending) else None
