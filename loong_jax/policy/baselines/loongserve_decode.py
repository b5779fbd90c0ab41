"""How LoongServe decodes: batches tied by their KV, masters, instances more (LoongServe section 3.2).

What it is: the division of rows among masters and both kinds of scale-up of the released code, in pages.
What it is not: when a batch decodes (`loongserve.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.policy.baselines.board import Board, kv_mask
from loong_jax.policy.groups import Group, ReadyGroups, mask_of, members
from loong_jax.types import Phase, PlannedDecode, PlannedDecodeRow, RequestView


class DecodeBatch:
    """Rows served together. `group` covers their KV, and their new one; `needy`: the rows that found no page."""

    __slots__ = ("group", "needy", "planned", "rows")

    def __init__(self, group: Group, rows: list[RequestView]) -> None:
        self.group, self.rows = group, rows
        self.planned: list[PlannedDecodeRow] = []
        self.needy = 0

    def decode(self) -> PlannedDecode | None:
        return PlannedDecode(self.group.instances, tuple(self.planned)) if self.planned else None


def batches(
    board: Board, ready: ReadyGroups, rows: Sequence[RequestView]
) -> tuple[list[DecodeBatch], list[RequestView]]:
    """Rows whose KV shares an instance are one batch, and so are those whose READY groups do. Where no group spans two
    that meet, the one with the oldest request goes, and the other waits. Also the rows that no group can span."""
    by_mask: dict[int, list[RequestView]] = {}
    for row in rows:
        by_mask.setdefault(kv_mask(row), []).append(row)
    stuck: list[RequestView] = []
    out: list[DecodeBatch] = []
    for mask, members_ in by_mask.items():
        batch = _cover(board, ready, mask, members_)
        if batch is None:
            stuck += members_
            continue
        merged = True
        while merged:
            merged = False
            for other in out:
                if not other.group.mask & batch.group.mask:
                    continue
                both = _cover(board, ready, other.group.mask | batch.group.mask, other.rows + batch.rows)
                if both is not None:
                    out.remove(other)
                    batch, merged = both, True
                    break
        out.append(batch)
    for batch in out:
        batch.rows.sort(key=lambda row: row.request)
    out.sort(key=lambda batch: batch.rows[0].request)
    return _apart(out), stuck


def _apart(batches: list[DecodeBatch]) -> list[DecodeBatch]:
    """Without those that meet one before them."""
    taken = 0
    out: list[DecodeBatch] = []
    for batch in batches:
        if not batch.group.mask & taken:
            taken |= batch.group.mask
            out.append(batch)
    return out


def _cover(board: Board, ready: ReadyGroups, mask: int, rows: list[RequestView]) -> DecodeBatch | None:
    group = ready.smallest(Phase.DECODE, mask, board.living)
    if group is not None:
        return DecodeBatch(group, rows)
    bucket = board.cluster.ladder.decode_rows[-1]
    prepare = ready.wanted(Phase.DECODE, mask, board.living, bucket, board.cluster)
    if prepare is not None:
        board.prepares.append(prepare)
    return None


def divide(board: Board, batch: DecodeBatch, master_rows: int, uniform: bool, extra: int, ready: ReadyGroups) -> int:
    """Give each row a master: the fullest instance with room takes `master_rows` of them, or all rows are shared out
    evenly with `uniform`. While masters have more than that, an instance of `extra` (a bit mask) joins. Returns the
    instances that did."""
    joined = 0
    while True:
        order = sorted(batch.group.instances, key=lambda i: (board.free[i], i))
        room = [i for i in order if board.free[i] or any(_open_on(row, i) for row in batch.rows)]
        if len(batch.rows) // max(1, len(room)) <= master_rows or not extra & ~joined:
            break
        wider = _wider(board, batch, extra & ~joined, ready)
        if wider is None:
            break
        joined |= wider.mask & ~batch.group.mask
        batch.group = wider
    _assign(board, batch, room, master_rows, uniform)
    return joined


def _wider(board: Board, batch: DecodeBatch, extra: int, ready: ReadyGroups) -> Group | None:
    """The smallest group with one of `extra` more."""
    return next(
        (
            group
            for group in ready.covering(Phase.DECODE, batch.group.mask, batch.group.mask | extra)
            if group.mask != batch.group.mask
        ),
        None,
    )


def with_memory(
    board: Board, ready: ReadyGroups, batches: list[DecodeBatch], extra: int
) -> tuple[list[DecodeBatch], int]:
    """Batches that are short of pages take in those with the most to spare, and only then an idle instance of `extra`.
    Returns the batches, and what is left of `extra`."""
    out = sorted(batches, key=lambda batch: (_slack(board, batch), batch.rows[0].request))
    for batch in list(out):
        while batch in out and _slack(board, batch) < 0:
            others = [other for other in out if other is not batch and _slack(board, other) > 0]
            other = max(others, key=lambda other: _slack(board, other), default=None)
            mask = batch.group.mask | (other.group.mask if other else 0)
            both = _cover(board, ready, mask, sorted((*batch.rows, *other.rows), key=_id)) if other else None
            if (
                both is not None
                and other is not None
                and not any(both.group.mask & third.group.mask for third in out if third not in (batch, other))
            ):
                out.remove(other)
                batch.group, batch.rows = both.group, both.rows
                continue
            wider = _wider(board, batch, extra, ready)
            if wider is None:
                break
            batch.group = wider
            extra &= ~wider.mask
    return out, extra


def _slack(board: Board, batch: DecodeBatch) -> int:
    return board.spare(batch.group.instances) - sum(1 for row in batch.rows if row.open_page is None)


def _id(row: RequestView) -> int:
    return row.request


def _open_on(row: RequestView, instance: int) -> bool:
    tail = row.open_page
    return tail is not None and tail[0] == instance


def _assign(board: Board, batch: DecodeBatch, room: Sequence[int], master_rows: int, uniform: bool) -> None:
    """Rows keep to their open page where its instance is a master: a page is lost with every change."""
    bucket = batch.group.bucket
    left = list(batch.rows)
    batch.planned, batch.needy = [], 0
    for index, instance in enumerate(room):
        share = len(left) // (len(room) - index)
        most = min(bucket, max(1, -(-len(left) // (len(room) - index))) if uniform else max(share, master_rows))
        left.sort(key=lambda row: (not _open_on(row, instance), row.request))
        rest: list[RequestView] = []
        for row in left:
            takes = not _open_on(row, instance)
            if most and (not takes or board.free[instance]):
                board.free[instance] -= takes
                batch.planned.append(PlannedDecodeRow(row.request, instance))
                most -= 1
            else:
                rest.append(row)
        left = rest
    if left and not any(board.free[i] for i in batch.group.instances):
        batch.needy = len(left)
    batch.planned.sort(key=lambda row: row.request)


def idle_mask(board: Board) -> int:
    """Living instances without KV and without a step."""
    pages = board.cluster.pages_per_instance
    idle = [i for i in members(board.living) if board.free[i] == pages and not board.queued[i]]
    return mask_of(idle)
