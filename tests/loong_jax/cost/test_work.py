"""What a command asks of the cost model, counted by hand."""

from __future__ import annotations

import pytest

from loong_jax.cost.unmeasured import unmeasured
from loong_jax.cost.work import (
    DecodeWork,
    MigrateWork,
    PrefillWork,
    decode_work,
    migrate_work,
    predicted_s,
    prefill_work,
)
from loong_jax.types import (
    ContextForm,
    DecodeRow,
    Migrate,
    PageMove,
    PrefillRow,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
)

RING = ContextForm.RING


def prefill_row(request: int, *runs: Run) -> PrefillRow:
    return PrefillRow(request, request, runs, b"", (), (), True, Sampling())


def decode_row(request: int, master: int) -> DecodeRow:
    return DecodeRow(request, request, 9, -1, master, 0, Run(0, 10), Sampling())


def test_prefill_counts_new_tokens_pairs_and_context() -> None:
    rows = (prefill_row(1, Run(0, 100)), prefill_row(2, Run(1000, 10)), prefill_row(3, Run(5, 5), Run(20, 10)))
    work = prefill_work(RunPrefill(0, (0, 2, 5), 128, RING, rows))
    pairs = 100 * 50 + 10 * 1005 + 5 * 7.5 + 10 * 25
    assert work == PrefillWork(3, 125, pairs, 0 + 1000 + 15, RING)


def test_decode_counts_the_fullest_master_and_the_fullest_instance() -> None:
    rows = (decode_row(1, 0), decode_row(2, 0), decode_row(3, 1))
    held = {1: {0: 10, 1: 50}, 2: {0: 20}, 3: {1: 5}}
    assert decode_work(RunDecode(0, (0, 1), 8, rows), held.__getitem__) == DecodeWork(2, 3, 2, 55)


def test_migration_counts_tokens() -> None:
    moves = tuple(PageMove(1, 0, page, 1, page, Run(4 * page, 4)) for page in range(3))
    assert migrate_work(Migrate(0, (0, 1), moves)) == MigrateWork(12)


def test_predictions_are_the_models() -> None:
    cost = unmeasured()
    assert predicted_s(cost, PrefillWork(2, 9, 40.5, 0, RING)) == cost.prefill_s(2, 9, 40.5, 0, RING)
    assert predicted_s(cost, DecodeWork(2, 3, 2, 55)) == cost.decode_s(2, 3, 2, 55)
    assert predicted_s(cost, MigrateWork(12)) == cost.migrate_s(12) == pytest.approx(1e-3 + 12e-6)
