"""From a plan to commands: every rule is checked, then pages are taken and the step is in flight.

What it is: one function per planned thing. KV, homes and lengths change at *issue*, because a device runs its programs
in order. A plan that breaks a rule is our bug, never the world's: `PlanError` names the rule (INV-10 is one of them).
What it is not: a choice of anything. Nothing is corrected here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec

from loong_jax import buckets
from loong_jax.core_state import MAX_QUEUED_STEPS, CoreState
from loong_jax.request_state import NO_SLOT, RequestState, whole
from loong_jax.types import (
    ContextForm,
    DecodeRow,
    Free,
    Migrate,
    PageMove,
    Phase,
    PlannedDecode,
    PlannedEvict,
    PlannedMigrate,
    PlannedPrefill,
    PlannedPrefillRow,
    PrefillRow,
    Program,
    Rehome,
    Run,
    RunDecode,
    RunPrefill,
)

Kept = list[tuple[int, list[int]]]
"""Pages by instance, in the order of the units that they are for."""


class PlanError(RuntimeError):
    """A policy's plan breaks a rule. The message names it."""


def _require(condition: bool, rule: str, *details: object) -> None:
    if not condition:
        raise PlanError(f"{rule}: {', '.join(map(str, details))}" if details else rule)


def evict(state: CoreState, planned: PlannedEvict) -> Free:
    request = _request(state, planned.request)
    _require(not request.steps, "evict: request has a step in flight", request.id)
    held = tuple(sorted(state.ledger.tokens(request.id)))
    _require(bool(held), "evict: request holds no KV", request.id)
    state.ledger.free(request.id, held)
    request.holes = whole(request.issued - 1)
    request.dropped = 0
    request.num_evictions += 1
    state.changes += 1
    return Free(request.id, held)


def migrate(state: CoreState, planned: PlannedMigrate) -> list[Migrate]:
    """As many commands of `move_pages` pages as the queues of both instances take; the rest waits for the next plan."""
    rehome = planned.rehome
    request = _request(state, rehome.request)
    pair = tuple(sorted((rehome.src, rehome.dst)))
    move_pages = state.cluster.ladder.move_pages
    _check_group(state, pair, Program(Phase.MIGRATE, 2, move_pages))
    steps = MAX_QUEUED_STEPS - max(state.queued[i] for i in pair)
    num_pages = min(rehome.pages, steps * move_pages)
    _check_rehome(state, rehome, num_pages)
    free = state.ledger.free_pages(rehome.dst)
    _require(num_pages <= free, "INV-10: migrate: target pages do not fit", rehome, free)
    out = []
    for first in range(0, num_pages, move_pages):
        moves = _take_moves(state, msgspec.structs.replace(rehome, pages=min(move_pages, num_pages - first)), 0)
        state.ledger.move(moves)
        step = state.open_step(pair, (), (request.id,))
        out.append(Migrate(step, pair, moves))
    return out


def decode(state: CoreState, planned: PlannedDecode) -> RunDecode:
    """The hot path: a rule is only spelled out when it is broken."""
    requests, ledger = state.requests, state.ledger
    instances = planned.instances
    group = _check_free_group(state, instances)
    masters = dict.fromkeys(instances, 0)
    rows: list[DecodeRow] = []
    samples: dict[int, int] = {}
    for planned_row in planned.rows:
        master = planned_row.master
        request = requests.get(planned_row.request)
        if request is None or request.id in samples:
            raise PlanError(f"decode: row is no live request, or there twice: {planned_row}")
        issued = request.issued
        if (
            request.holes
            or (request.num_prompt_top is not None and request.score)
            or issued >= request.end
            or master not in group
            or not group.issuperset(ledger.tokens(request.id))
        ):
            _check_decode_row(state, request, master, group)
        if request.slot == NO_SLOT:
            _start(state, request)
        token = -1
        if issued == len(request.tokens):
            token = request.tokens[-1]
        elif request.needs_history:
            raise PlanError(f"decode: penalties need the newest token on the host: {planned_row}")
        elif master not in request.sampled_on:
            raise PlanError(f"decode: master did not sample the newest token: {planned_row}, {request.sampled_on}")
        if not ledger.free_pages(master):
            tail = ledger.open_page(request.id, issued - 1, master)
            _require(tail is not None and tail[0] == master, "INV-10: decode: no free page on the master", planned_row)
        page, run = ledger.extend(request.id, master, issued - 1)
        request.issued = issued + 1
        # A row that is at its end, waits for the host, or came to another group: what was planned holds no more.
        if issued + 1 == request.end or request.needs_history or request.sampled_on != instances:
            state.changes += 1
        request.sampled_on = instances
        request.last_master = master
        masters[master] += 1
        samples[request.id] = issued
        row = DecodeRow(
            request.id, request.slot, issued - 1, token, master, page, run, request.sampling, request.rope_len
        )
        rows.append(row)
    _require(bool(rows), "decode: no rows", instances)
    bucket = buckets.decode_bucket(max(masters.values()), state.cluster.ladder)
    bucket = _ready_bucket(state, instances, Phase.DECODE, bucket)
    step = state.open_step(instances, tuple(samples.items()), tuple(samples))
    return RunDecode(step, instances, bucket, tuple(rows))


def prefill(state: CoreState, planned: PlannedPrefill) -> RunPrefill:
    instances = planned.instances
    ladder, page_tokens = state.cluster.ladder, state.cluster.page_tokens
    group = _check_free_group(state, instances)
    _require(1 <= len(planned.rows) <= ladder.prefill_rows, "prefill: number of rows", len(planned.rows))
    requests = [_check_prefill_row(state, row, group) for row in planned.rows]
    _require(len({r.id for r in requests}) == len(requests), "prefill: a request twice", planned.rows)
    _require(all(r.score == planned.score for r in requests), "prefill: scored beside unscored", planned.rows)
    units = [buckets.num_units(row.runs, page_tokens) for row in planned.rows]
    num_units = sum(units)
    phase = Phase.SCORE if planned.score else Phase.PREFILL
    smallest = buckets.prefill_bucket(num_units, len(instances), ladder.buckets(phase), page_tokens)
    bucket = _ready_bucket(state, instances, phase, smallest)
    _check_keep(state, planned, num_units)
    # All pages are taken before any moved page is released: within one program a page is either read or written.
    moves = _rehome_moves(state, planned.rehome)
    kept = [(share.instance, state.ledger.reserve(share.instance, share.pages)) for share in planned.keep]
    rows, samples = [], []
    for request, row, own in zip(requests, planned.rows, _cut(kept, units), strict=True):
        rows.append(_prefill_row(state, request, row.runs, own))
        if rows[-1].emit:
            samples.append((request.id, request.issued))
            request.issued += 1
            request.sampled_on = instances
    for part in moves:
        state.ledger.move(part)
    scored = tuple((row.request, row.runs) for row in rows) if planned.score else ()
    step = state.open_step(instances, tuple(samples), tuple(r.id for r in requests), is_prefill=True, scored=scored)
    all_moves = tuple(chain.from_iterable(moves))
    return RunPrefill(step, instances, bucket, planned.form, tuple(rows), all_moves, planned.score)


def _prefill_row(
    state: CoreState,
    request: RequestState,
    runs: tuple[Run, ...],
    kept: Kept,
) -> PrefillRow:
    """`kept`: the pages of its units, in order."""
    if request.slot == NO_SLOT:
        _start(state, request)
    page_tokens = state.cluster.page_tokens
    homes: list[int] = []
    pages: list[int] = []
    for run, parts in zip(runs, _cut(kept, [buckets.num_units((run,), page_tokens) for run in runs]), strict=True):
        first = run.first
        for home, own in parts:
            end = min(run.end, first + len(own) * page_tokens)
            state.ledger.commit(request.id, home, own, Run(first, end - first))
            homes += [home] * len(own)
            pages += own
            first = end
    emit = runs[-1].end == request.known
    request.last_master = homes[-1]
    request.holes = tuple(_subtract(request.holes, runs))
    tokens = _tokens_at(request, runs, 0)
    targets, num_top = (_tokens_at(request, runs, 1), request.num_prompt_top or 0) if request.score else (b"", 0)
    return PrefillRow(
        request.id, request.slot, runs, tokens, tuple(homes), tuple(pages), emit, request.sampling, request.rope_len,
        targets, num_top,
    )  # fmt: skip


def _cut(kept: Kept, sizes: Iterable[int]) -> Iterator[Kept]:
    """`kept`, cut into parts of so many pages."""
    index = skip = 0
    for size in sizes:
        part: Kept = []
        while size:
            instance, pages = kept[index]
            some = pages[skip : skip + size]
            part.append((instance, some))
            size -= len(some)
            index, skip = (index + 1, 0) if skip + len(some) == len(pages) else (index, skip + len(some))
        yield part


def _tokens_at(request: RequestState, runs: tuple[Run, ...], offset: int) -> bytes:
    """Ids at the positions of `runs`, shifted by `offset`; 0 beyond the known ones."""
    return b"".join(
        request.tokens[run.first + offset : run.end + offset].tobytes().ljust(4 * run.count, b"\0") for run in runs
    )


def _rehome_moves(state: CoreState, rehomes: Iterable[Rehome]) -> list[tuple[PageMove, ...]]:
    taken: dict[tuple[int, int], int] = {}
    moves: list[tuple[PageMove, ...]] = []
    for rehome in rehomes:
        source = (rehome.request, rehome.src)
        skip = taken.get(source, 0)
        moves.append(_take_moves(state, rehome, skip))
        taken[source] = skip + rehome.pages
    return moves


def _take_moves(state: CoreState, rehome: Rehome, skip: int) -> tuple[PageMove, ...]:
    """Moves of the lowest pages of the source after the first `skip`, with pages reserved on the destination. The
    ledger has not moved them yet."""
    request, src, dst = rehome.request, rehome.src, rehome.dst
    entries = state.ledger.table.some(request, src, skip, rehome.pages)
    pages = state.ledger.reserve(dst, rehome.pages)
    return tuple([PageMove(request, src, old, dst, new, run) for (old, run), new in zip(entries, pages, strict=True)])


def _subtract(holes: Iterable[Run], runs: tuple[Run, ...]) -> Iterable[Run]:
    """`holes` without the positions of `runs` (both ascending; a run may reach beyond the holes)."""
    for hole in holes:
        position = hole.first
        for run in runs:
            if run.end <= position:
                continue
            if run.first >= hole.end:
                break
            if run.first > position:
                yield Run(position, run.first - position)
            position = run.end
        if position < hole.end:
            yield Run(position, hole.end - position)


# ---- rules


def _request(state: CoreState, request: int) -> RequestState:
    found = state.requests.get(request)
    if found is None:
        raise PlanError(f"plan: request {request} is not live")
    return found


def _start(state: CoreState, request: RequestState) -> None:
    _require(state.free_places > 0, "plan: no place for a waiting request", request.id)
    state.start(request)


def _check_free_group(state: CoreState, instances: tuple[int, ...]) -> frozenset[int]:
    """The group as a set. What holds of it for ever is checked once."""
    group = state.groups.get(instances)
    if group is None:
        group = _group(state, instances)
    for instance in instances:
        if not state.has_room(instance):
            raise PlanError(f"INV-6: group: instance takes no step now: {instance}, {state.queued[instance]}")
    return group


def _group(state: CoreState, instances: tuple[int, ...]) -> frozenset[int]:
    _require(list(instances) == sorted(set(instances)), "group: instances are not sorted and unique", instances)
    _require(len(instances) in state.cluster.ladder.dops, "group: its size is no DoP of the ladder", instances)
    for instance in instances:
        _require(0 <= instance < state.cluster.num_instances, "group: no such instance", instance)
    group = state.groups[instances] = frozenset(instances)
    return group


def _check_ready(state: CoreState, instances: tuple[int, ...], program: Program) -> None:
    _require((program, instances) in state.ready, "group: program is not READY", program, instances)


def _ready_bucket(state: CoreState, instances: tuple[int, ...], phase: Phase, smallest: int | None) -> int:
    """The smallest READY bucket that is at least `smallest`."""
    if state.buckets_of is not state.ready:
        state.buckets_of, state.buckets = state.ready, {}
    key = (phase, instances, smallest)
    found = state.buckets.get(key)
    if found is None:
        found = state.buckets[key] = _find_bucket(state, instances, phase, smallest)
    return found


def _find_bucket(state: CoreState, instances: tuple[int, ...], phase: Phase, smallest: int | None) -> int:
    if smallest is not None:
        for bucket in state.cluster.ladder.buckets(phase):
            if bucket >= smallest and (Program(phase, len(instances), bucket), instances) in state.ready:
                return bucket
    raise PlanError(f"group: no READY {phase} program of bucket {smallest} or more on {instances}")


def _check_group(state: CoreState, instances: tuple[int, ...], program: Program) -> None:
    _check_free_group(state, instances)
    _check_ready(state, instances, program)


def _check_decode_row(state: CoreState, request: RequestState, master: int, group: frozenset[int]) -> None:
    """Says which rule a decode row breaks."""
    _require(not request.holes, "decode: request lacks KV", request.id, request.holes)
    _require(not request.score, "decode: the prompt is not scored yet", request.id)
    _require(request.issued < request.end, "decode: beyond max_tokens", request.id, request.issued, request.end)
    _require(master in group, "decode: master is not in the group", request.id, master)
    held = state.ledger.tokens(request.id)
    _require(group.issuperset(held), "decode: KV outside the group", request.id, sorted(held), sorted(group))


def _check_prefill_row(state: CoreState, row: PlannedPrefillRow, group: frozenset[int]) -> RequestState:
    request = _request(state, row.request)
    _require(not request.steps, "prefill: request has a step in flight", request.id)
    _require(bool(row.runs) and all(run.count > 0 for run in row.runs), "prefill: empty runs", row)
    held = state.ledger.tokens(request.id)
    _require(group.issuperset(held), "prefill: KV outside the group", request.id, sorted(held), sorted(group))
    # Causality: whatever is missing before the last computed position is computed too.
    end = row.runs[-1].end
    first_missing = [Run(run.first, min(run.end, end) - run.first) for run in request.missing if run.first < end]
    _require(_joined(row.runs) == first_missing, "prefill: runs are not the first missing ones", row, request.missing)
    return request


def _joined(runs: Iterable[Run]) -> list[Run]:
    out: list[Run] = []
    for run in runs:
        if out and out[-1].end == run.first:
            out[-1] = Run(out[-1].first, out[-1].count + run.count)
        else:
            out.append(run)
    return out


def _check_keep(state: CoreState, planned: PlannedPrefill, num_units: int) -> None:
    need: dict[int, int] = {}
    for share in planned.keep:
        _require(share.instance in planned.instances and share.pages > 0, "prefill: bad share", share)
        need[share.instance] = need.get(share.instance, 0) + share.pages
    _require(sum(need.values()) == num_units, "prefill: keep does not cover the units", planned.keep, num_units)
    if planned.rehome:
        _require(planned.form is ContextForm.RING, "prefill: only the ring re-homes context", planned.form)
    taken: dict[tuple[int, int], int] = {}
    rows = {row.request for row in planned.rows}
    for rehome in planned.rehome:
        _require(rehome.request in rows, "rehome: request is not in the batch", rehome)
        _require({rehome.src, rehome.dst} <= set(planned.instances), "rehome: outside the group", rehome)
        source = (rehome.request, rehome.src)
        _check_rehome(state, rehome, rehome.pages, taken.get(source, 0))
        taken[source] = taken.get(source, 0) + rehome.pages
        need[rehome.dst] = need.get(rehome.dst, 0) + rehome.pages
    for instance, pages in need.items():
        free = state.ledger.free_pages(instance)
        _require(pages <= free, "INV-10: prefill: target pages do not fit", instance, pages, free)


def _check_rehome(state: CoreState, rehome: Rehome, num_pages: int, taken: int = 0) -> None:
    held = state.ledger.table.num_pages(rehome.request, rehome.src) - taken
    _require(rehome.src != rehome.dst and 1 <= num_pages <= held, "rehome: no such pages", rehome, held)
