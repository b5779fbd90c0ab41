"""How LoongServe decodes: batches, masters, instances more."""

from __future__ import annotations

from collections import Counter

from loong_jax.policy.baselines import loongserve_decode as decode
from loong_jax.policy.baselines.board import Board, Buckets
from loong_jax.policy.groups import ReadyGroups
from tests.support.views import Seen, decoding, draft, instance


def made(
    rows: list[Seen], free: tuple[int, ...] = (16, 16, 16, 16), dops: tuple[int, ...] = (1, 2, 3, 4)
) -> tuple[Board, ReadyGroups]:
    """Groups of neighbours, two rows a master."""
    drawn = draft(rows, [instance(i, pages) for i, pages in enumerate(free)], dops=dops)
    return Board(drawn.cluster, drawn.limits, Buckets(), drawn.view, drawn.cost), drawn.ready


def masters(batch: decode.DecodeBatch) -> Counter[int]:
    return Counter(row.master for row in batch.planned)


def divided(rows: list[Seen], free: tuple[int, ...], master_rows: int, *, uniform: bool = False, extra: int = 0):
    board, ready = made(rows, free)
    ((batch,), stuck) = decode.batches(board, ready, rows)
    assert not stuck
    joined = decode.divide(board, batch, master_rows, uniform, extra, ready)
    return batch, joined


def test_rows_that_share_an_instance_are_a_batch() -> None:
    rows = [decoding(0, {0: 1}), decoding(1, {2: 1, 3: 1}), decoding(2, {0: 1}), decoding(3, {3: 1})]
    board, ready = made(rows)
    found, _ = decode.batches(board, ready, rows)
    assert [(batch.group.instances, [row.request for row in batch.rows]) for batch in found] == [
        ((0,), [0, 2]), ((2, 3), [1, 3]),
    ]  # fmt: skip


def test_of_batches_that_meet_and_no_group_spans_the_oldest_goes() -> None:
    rows = [decoding(0, {1: 1, 2: 1}), decoding(1, {0: 1, 1: 1}), decoding(2, {3: 1})]
    board, ready = made(rows, dops=(1, 2))
    found, stuck = decode.batches(board, ready, rows)
    assert [[row.request for row in batch.rows] for batch in found] == [[0], [2]]
    assert not stuck


def test_below_the_threshold_the_fullest_instance_with_room_is_the_only_master() -> None:
    rows = [decoding(k, {0: 2, 1: 3}) for k in range(2)]
    batch, _ = divided(rows, (12, 10), 2)
    assert masters(batch) == {1: 2}
    batch, _ = divided(rows, (12, 0), 2)  # full: a peer
    assert masters(batch) == {0: 2}


def test_above_it_they_are_shared_out_and_an_instance_joins() -> None:
    rows = [decoding(k, {0: 1, 1: 1}) for k in range(4)]
    batch, _ = divided(rows, (12, 12, 16, 16), 1)
    assert masters(batch) == {0: 2, 1: 2}
    batch, joined = divided(rows, (12, 12, 16, 16), 1, extra=0b1100)
    assert joined == 0b0100  # with three masters none has more than one row, and a part
    assert masters(batch) == {0: 1, 1: 1, 2: 2}


def test_by_the_paper_new_kv_is_shared_out_always() -> None:
    rows = [decoding(k, {0: 2, 1: 3}) for k in range(2)]
    batch, _ = divided(rows, (12, 10), 128, uniform=True)
    assert masters(batch) == {0: 1, 1: 1}


def test_a_row_stays_with_its_open_page() -> None:
    rows = [decoding(0, {0: 1, 1: 1}, open_page=(1, 2)), decoding(1, {0: 1, 1: 1}, open_page=(0, 2))]
    batch, _ = divided(rows, (12, 12), 1)
    assert {row.request: row.master for row in batch.planned} == {0: 1, 1: 0}


def test_a_batch_short_of_memory_takes_in_another_before_an_idle_instance() -> None:
    rows = [decoding(0, {0: 16}), decoding(1, {1: 1})]
    board, ready = made(rows, (0, 15, 16, 16))
    found, extra = decode.with_memory(board, ready, decode.batches(board, ready, rows)[0], 0b1100)
    assert [(batch.group.instances, len(batch.rows)) for batch in found] == [((0, 1), 2)]
    assert extra == 0b1100
    rows = [decoding(0, {0: 16})]
    board, ready = made(rows, (0, 16, 16, 16))
    found, extra = decode.with_memory(board, ready, decode.batches(board, ready, rows)[0], 0b1110)
    assert [batch.group.instances for batch in found] == [(0, 1)]
    assert extra == 0b1100


def test_rows_without_a_page_anywhere_are_counted() -> None:
    rows = [decoding(k, {0: 8}) for k in range(2)]
    batch, _ = divided(rows, (0, 16), 2)
    assert (batch.planned, batch.needy) == ([], 2)
