"""The ledger under random use: INV-4 and INV-5 hold after each change, and nothing shared is ever written."""

from __future__ import annotations

import random

import pytest

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.ledger import InvariantError, Ledger
from loong_jax.types import PageMove, Run


def make_ledger(pages: int = 12, page_tokens: int = 4, instances: int = 3, slots: int = 8) -> Ledger:
    ladder = LadderConfig(dops=(1, instances), prefill_tokens=(16,), decode_rows=(4,))
    return Ledger(
        ClusterConfig(
            num_instances=instances, page_tokens=page_tokens, pages_per_instance=pages, ring_tokens=16,
            query_tile_tokens=16, slots=slots, ladder=ladder,
        )
    )  # fmt: skip


def fill(ledger: Ledger, request: int, instance: int, first: int, count: int) -> None:
    """New KV in whole pages."""
    page_tokens = ledger.page_tokens
    pages = ledger.reserve(instance, -(-count // page_tokens))
    ledger.commit(request, instance, pages, Run(first, count))


@pytest.mark.parametrize("seed", range(30))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    ledger, ends, next_request = make_ledger(), {}, 0
    for _ in range(150):
        action = rng.choice(("new", "extend", "extend", "extend", "move", "fork", "truncate", "slide", "free", "lose"))
        request = rng.choice(sorted(ends)) if ends else None
        instance = rng.randrange(3)
        if action == "new" and ledger.free_pages(instance) >= 3:
            ends[next_request] = rng.randint(1, 12)
            fill(ledger, next_request, instance, 0, ends[next_request])
            next_request += 1
        elif request is None:
            continue
        elif action == "extend" and ledger.free_pages(instance):
            page, run = ledger.extend(request, instance, ends[request])
            ends[request] += 1
            assert ledger.owners(instance, page) == 1, "INV-5: a shared page was written"
            assert run.end == ends[request]
        elif action == "move" and ledger.table.pages(request, instance):
            entries = ledger.table.pages(request, instance)
            first = rng.randrange(len(entries))
            dst = (instance + 1) % 3
            some = entries[first : first + min(rng.randint(1, 3), ledger.free_pages(dst))]
            pages = ledger.reserve(dst, len(some))
            moves = [
                PageMove(request, instance, entry.page, dst, page, Run(entry.first, entry.count))
                for entry, page in zip(some, pages, strict=True)
            ]
            if moves:
                ledger.move(moves)
        elif action == "fork":
            kv_len = rng.randint(1, ends[request])
            copy_on = frozenset(rng.sample(range(3), rng.randint(0, 3)))
            forked = ledger.fork(request, next_request, kv_len, copy_on)
            assert all(run.end != kv_len or run.count == 4 for _, _, run in forked.shared), "open page is shared"
            missing = sum(run.count for run in ledger.table.missing(next_request, kv_len))
            parent_missing = sum(run.count for run in ledger.table.missing(request, kv_len))
            assert missing - parent_missing < 4, "only the open page may be left out"
            if ledger.tokens(next_request):
                ends[next_request] = kv_len
            next_request += 1
        elif action == "truncate":
            ends[request] = rng.randint(0, ends[request])
            ledger.truncate(request, ends[request])
        elif action == "slide" and ledger.tokens(request):
            first_end = min(e.end for i in range(3) for e in ledger.table.pages(request, i))
            start = first_end + rng.randint(0, 6)
            assert first_end <= ledger.slide(request, start) <= start
            assert all(e.end > start for i in range(3) for e in ledger.table.pages(request, i))
            with pytest.raises(InvariantError, match="INV-5"):
                ledger.slide(request, start)
        elif action in ("free", "lose"):
            instances = ledger.table.instances(request) if action == "free" else [instance]
            ledger.free(request, instances)
        ledger.check()
        for gone in [r for r in ends if not ledger.tokens(r)]:
            del ends[gone]
    for request in list(ends):
        ledger.free(request, range(3))
    ledger.check()
    assert [ledger.free_pages(i) for i in range(3)] == [12, 12, 12], "a page leaked"


def test_the_same_history_takes_the_same_pages() -> None:
    pages = []
    for _ in range(2):
        ledger = make_ledger()
        fill(ledger, 1, 0, 0, 10)
        ledger.truncate(1, 5)
        fill(ledger, 2, 0, 0, 8)
        pages.append([entry.page for entry in ledger.table.pages(2, 0)])
    assert pages[0] == pages[1]


def test_fork_copies_the_open_page_only() -> None:
    ledger = make_ledger()
    fill(ledger, 1, 0, 0, 10)
    pages = [entry.page for entry in ledger.table.pages(1, 0)]
    forked = ledger.fork(1, 2, 10, frozenset({0}))
    assert forked.shared == ((0, pages[0], Run(0, 4)), (0, pages[1], Run(4, 4)))
    assert forked.copied is not None
    assert forked.copied[:2] == (0, pages[2])
    parent_page, _ = ledger.extend(1, 0, 10)
    child_page, _ = ledger.extend(2, 0, 10)
    assert parent_page == pages[2]
    assert child_page == forked.copied[2] != pages[2]
    ledger.check()


def test_fork_goes_without_where_it_cannot_copy() -> None:
    ledger = make_ledger()
    fill(ledger, 1, 0, 0, 10)
    forked = ledger.fork(1, 2, 10, frozenset())
    assert forked.copied is None
    assert ledger.table.missing(2, 10) == [Run(8, 2)]


def test_fork_stops_at_the_table_s_end() -> None:
    """An instance's page table holds 2 * pages + 2 * slots entries, however often pages are shared; and every free page
    must still find an entry."""
    ledger = make_ledger(pages=10, slots=1)
    fill(ledger, 0, 0, 0, 32)
    for child in range(1, 6):
        ledger.fork(0, child, 32, frozenset())
        ledger.check()
    assert ledger.tokens(1) == {0: 32}
    assert ledger.tokens(2) == {0: 16}  # 22 entries: 8, 8, 4, and two for the free pages
    assert ledger.tokens(5) == {}
    fill(ledger, 6, 0, 0, 8)
    ledger.check()


def test_a_page_freed_twice_is_caught() -> None:
    ledger = make_ledger()
    fill(ledger, 1, 0, 0, 4)
    with pytest.raises(InvariantError, match="INV-4"):
        ledger.reserve(0, 12)
    ledger.free(1, [0])
    ledger._free[0].append(ledger._free[0][0])
    with pytest.raises(InvariantError, match="free twice"):
        ledger.check()
