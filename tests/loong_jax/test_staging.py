"""What a step is told, against numbers worked out by hand: four-token pages, ring tiles of two pages, DoP 2 or 3."""

import numpy as np
import pytest

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.esp.layout import OWN_FIELDS, decode_layout, prefill_layout, step_shape, transfer_layout
from loong_jax.page_table import PageTables
from loong_jax.staging import stage_decode, stage_prefill, stage_transfer
from loong_jax.types import (
    ContextForm,
    CopyPages,
    DecodeRow,
    Migrate,
    PageCopy,
    PageMove,
    Phase,
    PrefillRow,
    Program,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
)

CLUSTER = ClusterConfig(
    num_instances=6, page_tokens=4, pages_per_instance=10, ring_tokens=8, query_tile_tokens=8, slots=5,
    ladder=LadderConfig(dops=(1, 2, 3), prefill_tokens=(16,), decode_rows=(2,), prefill_rows=3, move_pages=4),
)  # fmt: skip
GROUP = (1, 4)
VOCAB = 100
RING, GATHER = ContextForm.RING, ContextForm.GATHER_Q
NUM_PAGES, NUM_SLOTS, NUM_ENTRIES = 10, 5, CLUSTER.table_entries
NONE = [-1, -1, 0, -1]


@pytest.fixture
def tables():
    return PageTables(CLUSTER.num_instances, NUM_ENTRIES, CLUSTER.page_tokens)


def ids(*tokens: int) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def prefill(tables: PageTables, rows, form=RING, moves=(), group=GROUP):
    shape = step_shape(Program(Phase.PREFILL, len(group), 16), CLUSTER, "cpu", VOCAB)
    staged = stage_prefill(RunPrefill(0, group, 16, form, tuple(rows), tuple(moves)), shape, tables)
    return staged, prefill_layout(shape).views(staged.packed)


def row(
    request: int, runs: list[Run], homes: list[int], pages: list[int], emit: bool = False, **sampling
) -> PrefillRow:
    tokens = ids(*(100 * request + p for run in runs for p in range(run.first, run.end)))
    sampled = Sampling(**sampling)
    return PrefillRow(
        request, request % 5, tuple(runs), tokens, tuple(homes), tuple(pages), emit, sampled, 40 + request
    )


def test_units_are_striped_across_requests(tables):
    """Six units of two rows, one of them partial in the middle: u on rank u mod 2, tokens beside them."""
    rows = [row(1, [Run(0, 6), Run(8, 4)], [1, 4, 1], [3, 5, 7]), row(2, [Run(2, 9)], [4, 4, 1], [0, 1, 2])]
    staged, fields = prefill(tables, rows)
    home = lambda rank, page: rank * NUM_PAGES + page
    assert fields["units"].tolist() == [
        [[0, 0, 4, home(0, 3)], [0, 8, 4, home(0, 7)], [1, 6, 4, home(1, 1)], NONE],
        [[0, 4, 2, home(1, 5)], [1, 2, 4, home(1, 0)], [1, 10, 1, home(0, 2)], NONE],
    ]
    assert fields["tokens"].tolist() == [
        [100, 101, 102, 103, 108, 109, 110, 111, 206, 207, 208, 209, 0, 0, 0, 0],
        [104, 105, 0, 0, 202, 203, 204, 205, 210, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert fields["num_emits"].tolist() == [0, 0]
    assert (fields["emit_index"] == -1).all()
    assert (fields["emit_slot"] == NUM_SLOTS).all(), "nobody's slot"
    assert fields["rope_len"].tolist() == [[41, 42, 0]] * 2
    assert staged.output.rows.tolist() == []
    assert staged.adjust is None
    assert staged.moves is None


def test_emit(tables):
    """The last token of a row lies on one rank; its sampling goes to all, as bits."""
    rows = [
        row(1, [Run(0, 6)], [1, 1], [3, 5], emit=True, temperature=0.5, top_k=7, top_p=0.25, seed=2**32 - 2),
        row(2, [Run(0, 4)], [1], [4]),
        row(3, [Run(4, 3)], [4], [6], emit=True, seed=5),
    ]
    staged, fields = prefill(tables, rows)
    assert fields["emit_index"].tolist() == [[-1, -1, -1], [1, -1, 4 + 2]]
    assert fields["emit_slot"].tolist() == [[1, NUM_SLOTS, 3]] * 2
    assert fields["emit_position"].tolist() == [[6, 0, 7]] * 2
    assert fields["temperature"].view(np.float32).tolist() == [[0.5, 0.0, 0.0]] * 2
    assert fields["top_p"].view(np.float32).tolist() == [[0.25, 0.0, 1.0]] * 2
    assert fields["top_k"].tolist() == [[7, 0, 0]] * 2
    assert fields["seed"].view(np.uint32).tolist() == [[2**32 - 2, 0, 5]] * 2
    assert fields["num_emits"].tolist() == [2, 2]
    assert staged.output.rows.tolist() == [0, 2]


def hold(tables: PageTables, request: int, pages: dict[int, int]) -> None:
    """`pages[instance]` whole pages, one after the other."""
    first = 0
    for instance, count in pages.items():
        for page in range(count):
            tables.tables[instance].put(request, page, Run(first, 4))
            first += 4


@pytest.mark.parametrize(
    ("held", "form", "ring_tiles", "query_tiles"),
    [
        ({}, RING, 0, 0),
        ({}, GATHER, 0, 0),
        ({1: 1}, RING, 1, 0),
        ({1: 2, 4: 2}, RING, 1, 0),
        ({1: 1, 4: 3}, RING, 2, 0),  # the fullest instance decides
        ({4: 5}, RING, 3, 0),
        ({4: 5}, GATHER, 0, 2),  # three units on the fuller rank, two in a tile
    ],
)
def test_trip_counts(tables, held, form, ring_tiles, query_tiles):
    hold(tables, 1, held)
    num_tokens = 4 * sum(held.values())
    _, fields = prefill(tables, [row(1, [Run(num_tokens, 20)], [1] * 5, [5, 6, 7, 8, 9])], form)
    assert fields["num_ring_tiles"].tolist() == [ring_tiles] * 2, "the same on all ranks"
    assert fields["num_query_tiles"].tolist() == [query_tiles] * 2


def test_trip_counts_add_up_over_rows(tables):
    hold(tables, 1, {1: 2})
    hold(tables, 2, {1: 1, 4: 2})
    _, fields = prefill(tables, [row(1, [Run(8, 1)], [1], [5]), row(2, [Run(12, 1)], [1], [6])])
    assert fields["num_ring_tiles"].tolist() == [2, 2]


def test_context_is_what_was_there_before(tables):
    """Ranges of each row on each instance; other requests and instances outside the group do not count."""
    hold(tables, 1, {1: 2, 4: 1})
    hold(tables, 2, {1: 9, 0: 3})
    hold(tables, 3, {4: 3})
    _, fields = prefill(tables, [row(3, [Run(12, 1)], [1], [9]), row(1, [Run(12, 1)], [1], [8])])
    starts = [[tables.tables[i].range(r)[0] for r in (3, 1)] for i in GROUP]
    assert fields["context_start"][:, :2].tolist() == starts
    assert fields["context_len"].tolist() == [[0, 2, 0], [3, 1, 0]]
    assert fields["num_ring_tiles"].tolist() == [2, 2]


def test_moves_name_the_entry_at_its_source(tables):
    hold(tables, 2, {4: 1})
    hold(tables, 1, {1: 2, 4: 2})
    moves = [PageMove(1, 1, 1, 4, 9, Run(4, 4)), PageMove(1, 4, 0, 1, 7, Run(8, 4))]
    staged, _ = prefill(tables, [row(1, [Run(16, 1)], [1], [5])], moves=moves)
    expected = np.full((2, NUM_ENTRIES), -1)
    expected[0, tables.tables[1].entry(1, 1)] = 1 * NUM_PAGES + 9
    expected[1, tables.tables[4].entry(1, 0)] = 0 * NUM_PAGES + 7
    assert (staged.moves == expected).all()


def test_deltas_are_a_view_of_what_is_sent(tables):
    staged, fields = prefill(tables, [row(1, [Run(0, 1)], [1], [5])])
    staged.deltas[1, 0] = 9, 8, 7, 6
    assert fields["deltas"][1, 0].tolist() == [9, 8, 7, 6]


def decode(tables: PageTables, rows, group=(0, 2, 5)):
    shape = step_shape(Program(Phase.DECODE, len(group), 2), CLUSTER, "cpu", VOCAB)
    staged = stage_decode(RunDecode(0, group, 2, tuple(rows)), shape, tables)
    return staged, decode_layout(shape).views(staged.packed)


def test_decode_rows_lie_with_their_masters(tables):
    """Three rows in the command's order, two of one master; unused places write nowhere and belong to nobody."""
    hold(tables, 7, {5: 1, 0: 2})
    hold(tables, 8, {2: 1})
    rows = [
        DecodeRow(
            8,
            3,
            4,
            44,
            5,
            1,
            Run(4, 1),
            Sampling(temperature=1.5, top_k=2, top_p=0.5, seed=9, min_p=0.25, num_top=3),
            30,
        ),
        DecodeRow(9, 1, 0, -1, 0, 2, Run(0, 1), Sampling(), 31),
        DecodeRow(7, 4, 14, 77, 5, 3, Run(12, 3), Sampling(), 32),
    ]
    staged, fields = decode(tables, rows)
    bits = lambda value: int(np.float32(value).view(np.int32))
    one, nobody = bits(1.0), [0, NUM_SLOTS, -1, NUM_PAGES, 0, 0, 0, 0, 0, 0, 0, 0]
    assert OWN_FIELDS[:6] == ("token", "slot", "position", "write_page", "write_slot", "rope_len")
    assert OWN_FIELDS[6:] == ("temperature", "top_p", "top_k", "seed", "min_p", "num_top")
    assert fields["own"].tolist() == [
        [[-1, 1, 0, 2, 0, 31, 0, one, 0, 0, 0, 0], nobody],
        [nobody, nobody],
        [[44, 3, 4, 1, 0, 30, bits(1.5), bits(0.5), 2, 9, bits(0.25), 3], [77, 4, 14, 3, 2, 32, 0, one, 0, 0, 0, 0]],
    ]
    every = [[1, 0], [NUM_SLOTS, -1], [NUM_SLOTS, -1], [NUM_SLOTS, -1], [3, 4], [4, 14]]
    assert fields["every"].tolist() == [every] * 3
    assert staged.output.rows.tolist() == [4, 0, 5], "sampled rows in the command's order"
    assert staged.output.num_tops == (3, 0, 0)
    lengths = fields["ranges"][..., 1]
    assert lengths.tolist() == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert fields["ranges"][0, 5].tolist() == list(tables.tables[0].range(7))


def test_migrate_pairs_places_in_both_directions():
    shape = step_shape(Program(Phase.MIGRATE, 2, 4), CLUSTER, "cpu", VOCAB)
    moves = (
        PageMove(1, 5, 8, 2, 3, Run(0, 4)),
        PageMove(1, 2, 6, 5, 7, Run(4, 4)),
        PageMove(2, 5, 9, 2, 4, Run(0, 4)),
    )
    fields = transfer_layout(shape).views(stage_transfer(Migrate(0, (2, 5), moves), shape).packed)
    assert fields["read_page"].tolist() == [[6, 0, 0, 0], [8, 9, 0, 0]]
    assert fields["write_page"].tolist() == [[3, 4, NUM_PAGES, NUM_PAGES], [7, NUM_PAGES, NUM_PAGES, NUM_PAGES]]


def test_copy_stays_at_home():
    shape = step_shape(Program(Phase.COPY, 1, 4), CLUSTER, "cpu", VOCAB)
    copies = (PageCopy(1, 2, 3, Run(0, 1)), PageCopy(2, 2, 4, Run(0, 2)))
    fields = transfer_layout(shape).views(stage_transfer(CopyPages(0, 3, copies), shape).packed)
    assert fields["read_page"].tolist() == [[2, 2, 0, 0]]
    assert fields["write_page"].tolist() == [[3, 4, NUM_PAGES, NUM_PAGES]]
