"""The page tables' mirror against a dict, and against a device that hears only deltas and uploads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_jax.page_table import NO_ENTRY, InstanceTable, PageTables, TableFull
from loong_jax.types import (
    ContextForm,
    CopyPages,
    DecodeRow,
    Fork,
    Free,
    Migrate,
    PageCopy,
    PageMove,
    PrefillRow,
    Reset,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    Slide,
    Truncate,
)

GREEDY = Sampling()
NUM_ENTRIES, NUM_DELTAS = 24, 6


class Device:
    """A table as a device keeps it. Deltas out of range are dropped."""

    def __init__(self, table: InstanceTable):
        self.table = table
        self.entries = np.zeros_like(table.entries)
        self.num_uploads = 0

    def step(self) -> None:
        deltas = np.full((NUM_DELTAS, 4), NO_ENTRY, np.int32)
        if not self.table.take_deltas(deltas):
            self.entries = self.table.upload()
            self.num_uploads += 1
            return
        assert len(set(deltas[deltas[:, 0] < NUM_ENTRIES, 0])) == (deltas[:, 0] < NUM_ENTRIES).sum(), "order matters"
        for entry, *row in deltas:
            if entry < NUM_ENTRIES:
                self.entries[entry] = row

    def held(self, request: int) -> set[tuple[int, int, int]]:
        start, length = self.table.range(request)
        rows = [tuple(map(int, row)) for row in self.entries[start : start + length]]
        assert len(rows) == length == len(set(rows))
        return set(rows)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 4), st.integers(0, 29), st.integers(1, 4)),
        st.tuples(st.just("put"), st.integers(0, 1), st.integers(0, 29), st.integers(1, 4)),
        st.tuples(st.just("remove"), st.integers(0, 4), st.integers(0, 29)),
        st.tuples(st.just("truncate"), st.integers(0, 4), st.integers(0, 120)),
        st.tuples(st.just("drop"), st.integers(0, 4)),
        st.tuples(st.just("step")),
    ),
    max_size=120,
)


@given(operations, st.booleans())
def test_equals_a_dict(ops, clear):
    """Whatever happened, the device holds just the dict's runs; page p of a request holds positions from 4p on."""
    table = InstanceTable(NUM_ENTRIES)
    device, model = Device(table), {}
    for index, (name, *args) in enumerate(ops):
        if clear and index == len(ops) // 2:
            table.clear()
            model = {}
        if name == "put":
            request, page, count = args
            if len(model) < NUM_ENTRIES or (request, page) in model:
                table.put(request, page, Run(4 * page, count))
                model[request, page] = (page, 4 * page, count)
        elif name == "remove":
            if tuple(args) in model:
                table.remove(*args)
                del model[tuple(args)]
        elif name == "truncate":
            request, kv_len = args
            table.truncate(request, kv_len)
            model = {
                key: (page, first, count if key[0] != request else min(count, kv_len - first))
                for key, (page, first, count) in model.items()
                if key[0] != request or first < kv_len
            }
        elif name == "drop":
            table.drop(*args)
            model = {key: run for key, run in model.items() if key[0] != args[0]}
        else:
            device.step()
    device.step()
    for request in range(5):
        assert device.held(request) == {run for (owner, _), run in model.items() if owner == request}
        for owner, page in model:
            if owner == request:
                assert table.entries[table.entry(request, page), 0] == page


def test_every_entry_can_be_used():
    """A table takes entries until it is full, also where one region cannot be doubled beside itself."""
    table = InstanceTable(100)
    for request in range(10):
        table.put(request, 0, Run(0, 4))
    for page in range(1, 91):
        table.put(0, page, Run(4 * page, 4))
    assert sorted(table.entries[slice(*_span(table, 0)), 0]) == list(range(91))
    with pytest.raises(TableFull, match="100"):
        table.put(1, 1, Run(4, 4))


def test_regions_are_used_again():
    table = InstanceTable(32)
    for request in range(100):
        for page in range(9):
            table.put(request, page, Run(4 * page, 4))
        table.drop(request)
    assert not table.stale, "nothing had to be compacted"


def test_few_changes_travel_as_deltas_many_as_an_upload():
    table = InstanceTable(64)
    device = Device(table)
    for page in range(NUM_DELTAS):
        table.put(0, page, Run(4 * page, 4))
    device.entries = np.zeros_like(table.entries)
    deltas = np.full((NUM_DELTAS, 4), NO_ENTRY, np.int32)
    assert table.take_deltas(deltas)
    assert deltas.tolist() == [[page, page, 4 * page, 4] for page in range(NUM_DELTAS)]
    deltas[:] = NO_ENTRY
    assert table.take_deltas(deltas)
    assert (deltas == NO_ENTRY).all(), "told once"
    for page in range(NUM_DELTAS + 1):
        table.put(1, page, Run(4 * page, 4))
    assert not table.take_deltas(deltas)
    assert (deltas == NO_ENTRY).all(), "nothing taken"
    assert (table.upload() == table.entries).all()
    assert table.take_deltas(deltas)
    assert (deltas == NO_ENTRY).all()


def test_upload_is_a_copy():
    table = InstanceTable(8)
    table.put(0, 1, Run(0, 4))
    uploaded = table.upload()
    table.put(0, 1, Run(0, 3))
    assert uploaded[0].tolist() == [1, 0, 4], "a step under way reads it"


def test_clear_uploads_all():
    table = InstanceTable(8)
    table.put(0, 1, Run(0, 4))
    table.clear()
    assert table.range(0) == (0, 0)
    assert not table.take_deltas(np.zeros((4, 4), np.int32))
    assert not table.upload().any()


def test_commands():
    """Every command that changes what is held, on two instances of four-token pages."""
    tables = PageTables(2, 32, 4)

    def held(request: int) -> list[dict[int, tuple[int, int]]]:
        return [
            {int(p): (int(f), int(c)) for p, f, c in table.entries[slice(*_span(table, request))]}
            for table in tables.tables
        ]

    row = PrefillRow(7, 0, (Run(0, 6), Run(8, 4)), b"", (0, 1, 1), (3, 4, 5), False, GREEDY)
    tables.apply(RunPrefill(1, (0, 1), 8, ContextForm.RING, (row,)))
    assert held(7) == [{3: (0, 4)}, {4: (4, 2), 5: (8, 4)}]
    tables.apply(RunDecode(2, (0, 1), 1, (DecodeRow(7, 0, 12, 9, 0, 6, Run(12, 1), GREEDY),)))
    tables.apply(RunDecode(3, (0, 1), 1, (DecodeRow(7, 0, 13, 9, 0, 6, Run(12, 2), GREEDY),)))
    assert held(7) == [{3: (0, 4), 6: (12, 2)}, {4: (4, 2), 5: (8, 4)}]
    tables.apply(Migrate(4, (0, 1), (PageMove(7, 1, 4, 0, 9, Run(4, 2)), PageMove(7, 0, 3, 1, 4, Run(0, 4)))))
    assert held(7) == [{9: (4, 2), 6: (12, 2)}, {4: (0, 4), 5: (8, 4)}]
    tables.apply(Fork(7, 8, ((1, 5, Run(8, 4)),)))
    tables.apply(CopyPages(5, 0, (PageCopy(8, 6, 1, Run(12, 2)),)))
    assert held(8) == [{1: (12, 2)}, {5: (8, 4)}]
    tables.apply(Truncate(7, 9))
    assert held(7) == [{9: (4, 2)}, {4: (0, 4), 5: (8, 1)}]
    assert held(8) == [{1: (12, 2)}, {5: (8, 4)}]
    tables.apply(Slide(8, 12))
    assert held(8) == [{1: (12, 2)}, {}]
    tables.apply(Slide(8, 13))
    assert held(8) == [{1: (12, 2)}, {}], "a page goes when all of it is passed"
    tables.apply(Free(7, (1,)))
    assert held(7) == [{9: (4, 2)}, {}]
    tables.apply(Reset((0,)))
    assert held(7) == [{}, {}]
    assert held(8) == [{}, {}]
    tables.apply(Fork(7, 8, ((1, 5, Run(8, 4)),)))
    row = PrefillRow(8, 0, (Run(0, 4),), b"", (0,), (2,), True, Sampling(seed=3))
    move = PageMove(8, 1, 5, 0, 3, Run(8, 4))
    tables.apply(RunPrefill(6, (0, 1), 8, ContextForm.RING, (row,), (move,)))
    assert held(8) == [{2: (0, 4), 3: (8, 4)}, {}]


def _span(table: InstanceTable, request: int) -> tuple[int, int]:
    start, length = table.range(request)
    return start, start + length
