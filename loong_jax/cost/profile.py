"""What to measure on an engine, and what follows from it: a plan of at most 32 batches, and their fit.

The plan is a function of the cluster: for three DoPs (1, the largest, one between; others are interpolated) prefills of
the ladder's sizes, of one long and of many short rows, and chunks over resident context in both its forms; decode steps
over rows, KV and masters; two migrations. The fit is least squares on relative error with no negative coefficient, the
published profile's form extended (LoongServe section 5.2). What it is not: the measuring (`serving/measuring.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.cost import fit, row_pairs
from loong_jax.cost.fitted import GLOBAL, PER_DOP, FittedCost
from loong_jax.cost.work import DecodeWork, MigrateWork, PrefillWork, Work, predicted_s
from loong_jax.types import ContextForm, Record

Phase = Literal["prefill", "decode", "migrate"]

MAX_BATCHES = 32
MAX_DOPS = 3
LONGEST = 32_768  # tokens of a request; more would only be waited for
_POOL_SHARE = 0.5  # of a group's pages a batch may fill
_CONTEXT_CHUNKS = 8  # resident context of a chunk, in chunks

_PREFILL = ("prefill_base_s", "prefill_token_s", "prefill_pair_s")
_DECODE = ("decode_base_s", "decode_master_row_s", "decode_kv_token_s")


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rows` requests on a group of `dop` instances. Prefill: each computes `new` tokens over `resident` ones, in
    `form`. Decode: each has `resident` tokens, and the first `masters` instances take the rows in turn. Migration:
    `new` tokens move."""

    phase: Phase
    dop: int
    rows: int
    new: int = 1
    resident: int = 0
    form: ContextForm = ContextForm.RING
    masters: int = 1

    @property
    def name(self) -> str:
        match self.phase:
            case "prefill":
                context = f" over {self.resident:,} ({self.form})" if self.resident else ""
                return f"prefill {self.rows} x {self.new:,}{context}"
            case "decode":
                masters = f", {self.masters} masters" if self.masters > 1 else ""
                return f"decode {self.rows} x {self.resident:,}{masters}"
            case _:
                return f"migrate {self.new:,}"


class Measurement(Record, frozen=True):
    """`work`: what the batch asked of the cost model; `seconds`: median of its repetitions."""

    batch: Batch
    work: Work
    seconds: float


class Fit(Record, frozen=True):
    """`errors`: of each measurement, relative, under all of them; `left_out`: under a fit that did not see it."""

    coefficients: dict[str, float]
    errors: tuple[float, ...]
    left_out: tuple[float, ...]


# ---- what to measure


def batches(cluster: ClusterConfig, longest: int = LONGEST) -> list[Batch]:
    """At most MAX_BATCHES, within the pool, the slots and the ladder, no request beyond `longest` tokens."""
    out: list[Batch] = []
    dops = chosen_dops(cluster.ladder.dops)
    for dop in dops:
        out += [*_prefills(cluster, dop, longest), *_decodes(cluster, dop, longest)]
    if 2 in cluster.ladder.dops:
        most = min(cluster.ladder.move_pages, int(_POOL_SHARE * cluster.pages_per_instance))
        out += [Batch("migrate", 2, 1, cluster.page_tokens * pages) for pages in sorted({1, max(1, most)})]
    out = list(dict.fromkeys(out))
    assert len(out) <= MAX_BATCHES, len(out)
    between = zip(*(_between(cluster, dop, longest) for dop in dops), strict=True)
    return list(dict.fromkeys([*out, *(batch for of_all in between for batch in of_all)]))[:MAX_BATCHES]


def chosen_dops(dops: Sequence[int]) -> tuple[int, ...]:
    """1, the largest, and the one nearest to their geometric mean."""
    largest = dops[-1]
    middle = min(dops, key=lambda dop: (abs(dop * dop - largest), dop))
    return tuple(sorted({1, middle, largest}))


def _prefills(cluster: ClusterConfig, dop: int, longest: int) -> Iterable[Batch]:
    ladder, page = cluster.ladder, cluster.page_tokens
    room = _room(cluster, dop, longest)
    sizes = [size for size in ladder.prefill_tokens if dop * size <= room] or [ladder.prefill_tokens[0]]
    small, large = min(dop * sizes[0], room), min(dop * sizes[-1], room)
    yield Batch("prefill", dop, 1, page)
    yield Batch("prefill", dop, 1, small)
    yield Batch("prefill", dop, 1, large)
    rows = max(1, min(ladder.prefill_rows, cluster.slots, large // page))
    yield Batch("prefill", dop, rows, max(page, large // rows // page * page))
    # Measured as the middle one of three chunks in a row.
    context = min(_CONTEXT_CHUNKS * small, room - 2 * small) // page * page
    if context >= small:
        yield Batch("prefill", dop, 1, small, context)
        if dop > 1:
            yield Batch("prefill", dop, 1, small, context, ContextForm.GATHER_Q)


def _decodes(cluster: ClusterConfig, dop: int, longest: int) -> Iterable[Batch]:
    page, most, long = cluster.page_tokens, _most_rows(cluster, dop), _long(cluster, dop, longest)
    yield Batch("decode", dop, 1, 1, page)
    yield Batch("decode", dop, 1, 1, long)
    yield Batch("decode", dop, most, 1, page)
    if dop > 1 and most > 1:
        yield Batch("decode", dop, most, 1, page, masters=dop)


def _between(cluster: ClusterConfig, dop: int, longest: int) -> Iterable[Batch]:
    """Batches between the others, the most telling first: they steady the fit where there is room for them."""
    page, most, long = cluster.page_tokens, _most_rows(cluster, dop), _long(cluster, dop, longest)
    small = min(dop * cluster.ladder.prefill_tokens[0], _room(cluster, dop, longest))
    rows = -(-most // 2)
    yield Batch("decode", dop, rows, 1, max(1, long // (2 * rows)))
    yield Batch("prefill", dop, max(1, min(4, cluster.slots, small // page)), page)
    yield Batch("decode", dop, 1, 1, max(page, long // 2))
    yield Batch("decode", dop, -(-most // 4), 1, page)
    yield Batch("prefill", dop, 1, max(page, small // 2 // page * page))


def _most_rows(cluster: ClusterConfig, dop: int) -> int:
    """On one master, with room for the pages they are decoded into."""
    pages = _pages(cluster) // 2
    return max(1, min(cluster.ladder.decode_rows[-1], cluster.slots, pages))


def _long(cluster: ClusterConfig, dop: int, longest: int) -> int:
    page = cluster.page_tokens
    return max(page, (_room(cluster, dop, longest) - 2 * page) // page * page)


def _room(cluster: ClusterConfig, dop: int, longest: int) -> int:
    """Tokens that the batch of a group may take."""
    return max(2 * cluster.page_tokens, min(dop * _pages(cluster) * cluster.page_tokens, longest))


def _pages(cluster: ClusterConfig) -> int:
    """Of an instance, that a batch may take."""
    return max(2, int(_POOL_SHARE * cluster.pages_per_instance))


# ---- what follows


def fitted(measured: Sequence[Measurement], ladder: LadderConfig) -> Fit:
    """Coefficients for the DoPs that were measured. Raises ValueError where a phase was not measured at all."""
    coefficients = _coefficients(measured, ladder)
    errors = _errors(coefficients, measured, ladder)
    left_out: list[float] = []
    for i, one in enumerate(measured):
        rest = [*measured[:i], *measured[i + 1 :]]
        try:
            left_out += _errors(_coefficients(rest, ladder), [one], ladder)
        except ValueError:  # the only one of its kind
            left_out.append(float("nan"))
    return Fit(coefficients, tuple(errors), tuple(left_out))


def _errors(coefficients: dict[str, float], measured: Sequence[Measurement], ladder: LadderConfig) -> list[float]:
    cost = FittedCost(coefficients, ladder)
    return [predicted_s(cost, m.work) / m.seconds - 1 for m in measured]


def _coefficients(measured: Sequence[Measurement], ladder: LadderConfig) -> dict[str, float]:
    dops = sorted({m.batch.dop for m in measured if m.batch.phase != "migrate"})
    out = {f"{name}.{dop}": 0.0 for dop in dops for name in PER_DOP}
    out.update(dict.fromkeys(GLOBAL, 0.0))
    unit = FittedCost({name: 1.0 for name in out} if dops else out, ladder)
    for phase, own, shared in (
        ("prefill", _PREFILL, ("prefill_ring_token_s", "prefill_gather_token_s")),
        ("decode", _DECODE, ("decode_row_s", "decode_masters_s")),
    ):
        chosen = [m for m in measured if m.batch.phase == phase]
        out.update(_fit_phase(chosen, dops, own, shared, unit))
    moves = [m for m in measured if isinstance(m.work, MigrateWork)]
    if moves:
        rows = [[1.0, float(m.work.tokens)] for m in moves if isinstance(m.work, MigrateWork)]
        out["migrate_base_s"], out["migrate_token_s"] = fit.relative(rows, [m.seconds for m in moves])
    return out


def _fit_phase(
    measured: Sequence[Measurement],
    dops: Sequence[int],
    own: Sequence[str],
    shared: Sequence[str],
    unit: FittedCost,
) -> dict[str, float]:
    """`own` coefficients are of each DoP; `shared` ones are what travels between instances: (dop - 1) / dop of a number
    that is the same for all, because a link does not know the group."""
    rows: list[list[float]] = []
    for m in measured:
        terms = _terms(unit, m.work)
        rows.append(
            [terms.get(name, 0.0) * (m.batch.dop == dop) for dop in dops for name in own]
            + [terms.get(name, 0.0) * (m.batch.dop - 1) / m.batch.dop for name in shared]
        )
    found = iter(fit.relative(rows, [m.seconds for m in measured]))
    out = {f"{name}.{dop}": next(found) for dop in dops for name in own}
    for name in shared:
        value = next(found)
        out.update({f"{name}.{dop}": value * (dop - 1) / dop for dop in dops})
    return out


def _terms(unit: FittedCost, work: Work) -> dict[str, float]:
    """The floors of memory are not told apart from the rest by so few batches: `unit` has none that bind."""
    match work:
        case PrefillWork():
            return unit.prefill_terms(work.dop, work.tokens, work.pairs, work.context, work.form)
        case DecodeWork():
            return unit.decode_terms(work.dop, work.rows, work.rows_per_master, work.kv_tokens)
        case MigrateWork():
            return {"migrate_base_s": 1.0, "migrate_token_s": float(work.tokens)}


def work_of(batch: Batch) -> Work:
    """What `batch` asks of the cost model when its KV is spread evenly over the group."""
    match batch.phase:
        case "prefill":
            pairs = batch.rows * row_pairs(batch.new, batch.resident)
            return PrefillWork(batch.dop, batch.rows * batch.new, pairs, batch.rows * batch.resident, batch.form)
        case "decode":
            kv_tokens = -(-batch.rows * batch.resident // batch.dop)
            return DecodeWork(batch.dop, batch.rows, -(-batch.rows // batch.masters), kv_tokens)
        case _:
            return MigrateWork(batch.new)
