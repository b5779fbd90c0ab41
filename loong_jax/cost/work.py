"""What a step has to do, in the words of the cost model: from a command to the arguments of a prediction.

What it is: arithmetic over a command's rows. What it is not: a price (`fitted.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loong_jax.cost import CostModel
from loong_jax.types import ContextForm, Migrate, Record, RunDecode, RunPrefill


class PrefillWork(Record, frozen=True):
    """The arguments of `CostModel.prefill_s`."""

    dop: int
    tokens: int
    pairs: float
    context: int
    form: ContextForm


class DecodeWork(Record, frozen=True):
    """The arguments of `CostModel.decode_s`."""

    dop: int
    rows: int
    rows_per_master: int
    kv_tokens: int


class MigrateWork(Record, frozen=True):
    tokens: int


Work = PrefillWork | DecodeWork | MigrateWork
KvTokens = Callable[[int], Mapping[int, int]]
"""Of a request: tokens of KV by instance (`Ledger.tokens`)."""


def prefill_work(command: RunPrefill) -> PrefillWork:
    tokens, context, pairs = 0, 0, 0.0
    for row in command.rows:
        new = 0
        for run in row.runs:
            new += run.count
            pairs += run.count * (run.count / 2 + run.first)
        tokens += new
        context += row.runs[-1].end - new
    return PrefillWork(len(command.instances), tokens, pairs, context, command.form)


def decode_work(command: RunDecode, kv_tokens: KvTokens) -> DecodeWork:
    """Costs a look at each row: the live loop takes it of a few steps only."""
    held: dict[int, int] = {}
    masters: dict[int, int] = {}
    for row in command.rows:
        masters[row.master] = masters.get(row.master, 0) + 1
        for instance, tokens in kv_tokens(row.request).items():
            held[instance] = held.get(instance, 0) + tokens
    fullest = max(held.values(), default=0)
    return DecodeWork(len(command.instances), len(command.rows), max(masters.values()), fullest)


def migrate_work(command: Migrate) -> MigrateWork:
    return MigrateWork(sum(move.run.count for move in command.moves))


def predicted_s(cost: CostModel, work: Work) -> float:
    match work:
        case PrefillWork():
            return cost.prefill_s(work.dop, work.tokens, work.pairs, work.context, work.form)
        case DecodeWork():
            return cost.decode_s(work.dop, work.rows, work.rows_per_master, work.kv_tokens)
        case MigrateWork():
            return cost.migrate_s(work.tokens)
