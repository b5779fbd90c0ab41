"""From a command to the packed arrays of its step.

Pure numpy: units are striped, tokens placed, page-table ranges looked up, sampling parameters written as bits. The
field names are those of `esp/layout.py`. What it is not: the page tables (`page_table.py`) or the call
(`executor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from loong_jax.buckets import units
from loong_jax.esp.layout import (
    NOWHERE,
    OWN_FIELDS,
    SAMPLING_FIELDS,
    Layout,
    StepShape,
    adjust_layout,
    decode_layout,
    prefill_layout,
    transfer_layout,
)
from loong_jax.esp.sampled import SCORE_TILE
from loong_jax.page_table import NO_ENTRY, PageTables
from loong_jax.row_adjust import RowAdjust
from loong_jax.types import ContextForm, CopyPages, Migrate, RunDecode, RunPrefill, Sampling

_NUM_TOP = OWN_FIELDS.index("num_top")
_NO_ROW = tuple(NOWHERE if name == "position" else 0 for name in OWN_FIELDS)


class Output(NamedTuple):
    """`rows`: indices into the sampled output, in the order of `StepDone.tokens`; `num_tops`: likeliest tokens wanted
    for each, () when none is. `scored`: where the scores of each row of a scoring prefill lie, and likeliest tokens."""

    rows: np.ndarray
    num_tops: tuple[int, ...] = ()
    scored: tuple[tuple[np.ndarray, int], ...] = ()


class Staged(NamedTuple):
    """`packed` `[dop, size]` int32; `deltas`: its view `[dop, num_deltas, 4]`, all NO_ENTRY yet; `output`: how to read
    what the step gives; `adjust` `[dop, size]` and `moves` `[dop, entries]`, int32 or None for blank ones."""

    packed: np.ndarray
    deltas: np.ndarray
    output: Output
    adjust: np.ndarray | None = None
    moves: np.ndarray | None = None


Adjusts = Mapping[int, RowAdjust]
"""Of the adjusted requests, by request."""

NO_ADJUSTS: Adjusts = {}


class _Blank(NamedTuple):
    """A step without rows, made once per shape: staging a step starts with a copy of it."""

    layout: Layout
    packed: np.ndarray

    def copy(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        packed = self.packed.copy()
        return packed, self.layout.views(packed)


def _blank(shape: StepShape, layout: Layout) -> tuple[_Blank, dict[str, np.ndarray]]:
    packed = np.zeros((shape.dop, layout.size), np.int32)
    fields = layout.views(packed)
    fields["deltas"][..., 0] = NO_ENTRY
    return _Blank(layout, packed), fields


@cache
def _blank_prefill(shape: StepShape) -> _Blank:
    blank, fields = _blank(shape, prefill_layout(shape))
    fields["units"][:] = NOWHERE
    fields["units"][..., 2] = 0
    fields["emit_index"][:] = NOWHERE
    fields["emit_slot"][:] = shape.num_slots
    return blank


@cache
def _blank_decode(shape: StepShape) -> _Blank:
    blank, fields = _blank(shape, decode_layout(shape))
    fields["own"][:] = _NO_ROW
    fields["own"][..., OWN_FIELDS.index("slot")] = shape.num_slots
    fields["own"][..., OWN_FIELDS.index("write_page")] = shape.num_pages
    fields["every"][:] = shape.num_slots, NOWHERE
    return blank


@cache
def _blank_transfer(shape: StepShape) -> _Blank:
    blank, fields = _blank(shape, transfer_layout(shape))
    fields["write_page"][:] = shape.num_pages
    return blank


@lru_cache(maxsize=4096)
def _sampling_fields(sampling: Sampling) -> tuple[int, ...]:
    """As SAMPLING_FIELDS; floats as bits."""
    bits = lambda value: int(np.float32(value).view(np.int32))
    seed = int(np.uint32(sampling.seed & 0xFFFFFFFF).view(np.int32))
    return (
        bits(sampling.temperature),
        bits(sampling.top_p),
        sampling.top_k,
        seed,
        bits(sampling.min_p),
        sampling.num_top,
    )


def _num_tops(samplings: list[Sampling]) -> tuple[int, ...]:
    wanted = tuple(sampling.num_top for sampling in samplings)
    return wanted if any(wanted) else ()


class _Stripes(NamedTuple):
    """Units of a batch in stripe order, one array entry per unit."""

    row: np.ndarray
    first: np.ndarray
    count: np.ndarray
    home: np.ndarray  # rank * num_pages + page
    last: np.ndarray  # index of each row's last unit, one per row


def _stripes(command: RunPrefill, shape: StepShape) -> _Stripes:
    rank = {instance: r for r, instance in enumerate(command.instances)}
    row, first, count, home, last = [], [], [], [], []
    for index, prefill_row in enumerate(command.rows):
        cut = units(prefill_row.runs, shape.page_tokens)
        row += [index] * len(cut)
        first += [run.first for run in cut]
        count += [run.count for run in cut]
        home += [
            rank[instance] * shape.num_pages + page
            for instance, page in zip(prefill_row.homes, prefill_row.pages, strict=True)
        ]
        last.append(len(row) - 1)
    return _Stripes(*(np.array(x, np.int32) for x in (row, first, count, home, last)))


def _context_ranges(command: RunPrefill, tables: PageTables, fields: dict[str, np.ndarray]) -> np.ndarray:
    """Write each instance's entries of each row; returns the number of context pages on each instance."""
    for rank, instance in enumerate(command.instances):
        table = tables.tables[instance]
        for index, row in enumerate(command.rows):
            fields["context_start"][rank, index], fields["context_len"][rank, index] = table.range(row.request)
    return fields["context_len"].sum(axis=1)


def _moves(command: RunPrefill, tables: PageTables, num_pages: int) -> np.ndarray | None:
    if not command.moves:
        return None
    rank = {instance: r for r, instance in enumerate(command.instances)}
    moves = np.full((len(command.instances), len(tables.tables[0].entries)), NOWHERE, np.int32)
    for move in command.moves:
        entry = tables.tables[move.src].entry(move.request, move.src_page)
        moves[rank[move.src], entry] = rank[move.dst] * num_pages + move.dst_page
    return moves


def _adjust_prefill(
    command: RunPrefill, shape: StepShape, adjusts: Adjusts, rank_of_row: np.ndarray
) -> np.ndarray | None:
    """Adjustments of the emitting rows, each where its last token lies."""
    newest = lambda row: int(np.frombuffer(row.tokens, "<i4")[-1])
    found = [
        (adjusts[row.request], (int(rank_of_row[i]), i), row.runs[-1].end - 1, newest(row))
        for i, row in enumerate(command.rows)
        if row.emit and row.request in adjusts
    ]
    return _write_adjusts(found, shape, shape.prefill_rows)


def _adjust_decode(command: RunDecode, shape: StepShape, adjusts: Adjusts, where: list[int]) -> np.ndarray | None:
    found = [
        (adjusts[row.request], divmod(at, shape.bucket), row.position, row.token)
        for at, row in zip(where, command.rows, strict=True)
        if row.request in adjusts
    ]
    return _write_adjusts(found, shape, shape.bucket)


def _write_adjusts(
    found: list[tuple[RowAdjust, tuple[int, int], int, int]], shape: StepShape, num_rows: int
) -> np.ndarray | None:
    """`found`: what adjusts a row, the row's (rank, place), its newest position and token."""
    if not found:
        return None
    layout = adjust_layout(shape, num_rows)
    packed = np.zeros((shape.dop, layout.size), np.int32)
    fields = layout.views(packed)
    for adjust, place, position, token in found:
        adjust.observe(position, token)
        adjust.write(fields, place, position + 1)
    return packed


def _stage_scores(
    command: RunPrefill, shape: StepShape, fields: dict[str, np.ndarray], rank: np.ndarray, at: np.ndarray
) -> tuple[tuple[np.ndarray, int], ...]:
    """Targets of a scoring prefill; where the scores of each row will lie."""
    fields["targets"][rank, at] = np.concatenate([np.frombuffer(row.targets, "<i4") for row in command.rows])
    fields["num_score_tiles"][:] = -(-(int(at.max()) + 1) // min(SCORE_TILE, shape.bucket))
    fields["num_score_top"][:] = max(row.num_top for row in command.rows)
    ends = np.cumsum([len(row.tokens) // 4 for row in command.rows])
    index = rank * shape.bucket + at
    return tuple((part, row.num_top) for part, row in zip(np.split(index, ends[:-1]), command.rows, strict=True))


def stage_prefill(command: RunPrefill, shape: StepShape, tables: PageTables, adjusts: Adjusts = NO_ADJUSTS) -> Staged:
    """The chunk's data; `tables` must not yet know the chunk's own pages."""
    packed, fields = _blank_prefill(shape).copy()
    stripes = _stripes(command, shape)
    index = np.arange(len(stripes.row))
    rank, place = index % shape.dop, index // shape.dop
    fields["units"][rank, place] = np.stack([stripes.row, stripes.first, stripes.count, stripes.home], axis=1)

    ids = np.concatenate([np.frombuffer(row.tokens, "<i4") for row in command.rows])
    unit = np.repeat(index, stripes.count)
    slot = np.arange(len(ids)) - np.repeat(np.cumsum(stripes.count) - stripes.count, stripes.count)
    at = place[unit] * shape.page_tokens + slot
    fields["tokens"][rank[unit], at] = ids
    scored = _stage_scores(command, shape, fields, rank[unit], at) if shape.scores else ()

    fields["rope_len"][:, : len(command.rows)] = [row.rope_len for row in command.rows]
    context_pages = _context_ranges(command, tables, fields)
    most = int(context_pages.max())
    if command.form is ContextForm.RING:
        fields["num_ring_tiles"][:] = -(-most // shape.ring_pages)
    elif most > 0:
        fields["num_query_tiles"][:] = -(-(int(place.max()) + 1) // shape.query_tile_units)

    emits = [i for i, row in enumerate(command.rows) if row.emit]
    for i in emits:
        row, last = command.rows[i], stripes.last[i]
        fields["emit_index"][rank[last], i] = place[last] * shape.page_tokens + stripes.count[last] - 1
        fields["emit_slot"][:, i] = row.slot
        fields["emit_position"][:, i] = row.runs[-1].end
        for name, value in zip(SAMPLING_FIELDS, _sampling_fields(row.sampling), strict=True):
            fields[name][:, i] = value
    fields["num_emits"][:] = len(emits)
    num_tops = _num_tops([command.rows[i].sampling for i in emits])
    adjust = _adjust_prefill(command, shape, adjusts, rank[stripes.last]) if adjusts else None
    moves = _moves(command, tables, shape.num_pages)
    return Staged(packed, fields["deltas"], Output(np.array(emits, np.int32), num_tops, scored), adjust, moves)


def stage_decode(command: RunDecode, shape: StepShape, tables: PageTables, adjusts: Adjusts = NO_ADJUSTS) -> Staged:
    """The step's data; `tables` must already know the rows' new pages. Runs once a token: rows are collected in lists
    and written in blocks, because each write into an array costs as much as a whole block."""
    packed, fields = _blank_decode(shape).copy()
    rank_of = {instance: rank for rank, instance in enumerate(command.instances)}
    num_mastered = [0] * shape.dop
    where, own = [], []
    for row in command.rows:
        rank = rank_of[row.master]
        where.append(rank * shape.bucket + num_mastered[rank])
        num_mastered[rank] += 1
        own.append(
            (
                row.token,
                row.slot,
                row.position,
                row.page,
                row.run.count - 1,
                row.rope_len,
                *_sampling_fields(row.sampling),
            )
        )
    at = np.array(where)
    own = np.array(own, np.int32)
    num_tops = tuple(own[:, _NUM_TOP].tolist()) if own[:, _NUM_TOP].any() else ()
    fields["own"][at // shape.bucket, at % shape.bucket] = own
    fields["every"][:, at] = own[:, 1:3]  # slot, position
    requests = [row.request for row in command.rows]
    held = [
        (rank, *range_of_row)
        for rank, instance in enumerate(command.instances)
        for range_of_row in tables.tables[instance].ranges(requests)
    ]
    if held:
        rank, row, start, length = np.array(held).T
        fields["ranges"][rank, at[row]] = np.stack([start, length], axis=1)
    adjust = _adjust_decode(command, shape, adjusts, where) if adjusts else None
    return Staged(packed, fields["deltas"], Output(at, num_tops), adjust)


def stage_transfer(command: Migrate | CopyPages, shape: StepShape) -> Staged:
    """Pages to read and to write, place by place; each direction of a migrate uses the places in order."""
    packed, fields = _blank_transfer(shape).copy()
    if isinstance(command, CopyPages):
        for i, copy in enumerate(command.copies):
            fields["read_page"][0, i], fields["write_page"][0, i] = copy.src_page, copy.dst_page
    else:
        rank_of = {instance: r for r, instance in enumerate(command.instances)}
        used = [0, 0]
        for move in command.moves:
            src, dst = rank_of[move.src], rank_of[move.dst]
            fields["read_page"][src, used[src]], fields["write_page"][dst, used[src]] = move.src_page, move.dst_page
            used[src] += 1
    return Staged(packed, fields["deltas"], Output(np.zeros(0, np.int32)))
