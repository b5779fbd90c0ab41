"""A round of LoongServe: its prompt batches, where KV stays, and when it is over (LoongServe 2.3, 4.3, 4.4).

What it is: batching (the released one or the exact one), retention on the fewest instances, one step's plan of a batch.
What it is not: who takes part, or which instances there are (`loongserve.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loong_jax import buckets
from loong_jax.policy.baselines.board import Board, Instances, kv_mask
from loong_jax.policy.baselines.loongserve_dispatch import prefill_s
from loong_jax.policy.batch import Batching, Shape, Slots, Work
from loong_jax.policy.groups import Group, ReadyGroups, mask_of, members
from loong_jax.types import (
    ContextForm,
    PlannedPrefill,
    PlannedPrefillRow,
    RequestView,
    Run,
    Share,
)

_MAX_EXACT = 64
"""Requests in the exact programme."""


class Prompts(NamedTuple):
    """Requests prefilled together, the longest first, for predicted `seconds`."""

    instances: Instances
    requests: list[int]
    seconds: float


class Round(NamedTuple):
    """`suspended`: requests whose decoding stops until the round is over; `until_us`: when it is predicted to be."""

    prompts: list[Prompts]
    suspended: set[int]
    until_us: int

    def prefilling(self, board: Board, by_id: Mapping[int, RequestView]) -> int:
        """Instances of batches that are not through."""
        mask = 0
        for batch in self.prompts:
            if any(board.view.instances[i].prefilling for i in batch.instances) or left(batch, by_id):
                mask |= mask_of(batch.instances)
        return mask

    def open_ids(self, by_id: Mapping[int, RequestView]) -> set[int]:
        return {request for batch in self.prompts for request in batch.requests if request in by_id}


def left(batch: Prompts, by_id: Mapping[int, RequestView]) -> list[RequestView]:
    """Its requests with prompt to compute."""
    found = [by_id[request] for request in batch.requests if request in by_id]
    return [r for r in found if r.in_flight == 0 and (not r.running or not r.resident)]


def split(
    board: Board, ready: ReadyGroups, requests: Sequence[RequestView], mask: int, *, one_batch: bool
) -> list[Prompts]:
    """Batches on groups of the instances in `mask`; the last requests are left out where they do not fit."""
    if not one_batch:
        exact = _exact(board, ready, requests[:_MAX_EXACT], mask)
        if exact:
            return exact
    for count in range(len(requests), 0, -1):
        batch = _one(board, ready, requests[:count], mask)
        if batch is not None:
            return [batch]
    phase = requests[0].prefill_phase
    num_pages = board.pages_needed(requests[0])
    least_dop = -(-num_pages // board.cluster.pages_per_instance)
    sizes = board.cluster.ladder.buckets(phase)
    prepare = ready.wanted(phase, mask & -mask, board.living, sizes[-1], board.cluster, least_dop) if sizes else None
    if prepare is not None:
        board.prepares.append(prepare)
    return []


def _one(board: Board, ready: ReadyGroups, requests: Sequence[RequestView], mask: int) -> Prompts | None:
    """The released programme: always one batch, on the number of least used instances that is best for it."""
    tokens = sum(r.known for r in requests)
    squares = float(sum(r.known * r.known for r in requests))
    needed = sum(map(board.pages_needed, requests))
    best: tuple[tuple[float, int, int, Instances], Group] | None = None
    for group in ready.covering(requests[0].prefill_phase, 0, mask):
        spare = board.spare(group.instances)
        if spare < needed:
            continue
        seconds = prefill_s(board, group.dop, tokens, squares)
        key = (seconds, group.dop, -spare, group.instances)
        if best is None or key < best[0]:
            best = (key, group)
    if best is None:
        return None
    ordered = sorted(requests, key=lambda r: (-r.known, r.request))
    return Prompts(best[1].instances, [r.request for r in ordered], best[0][0])


def _exact(board: Board, ready: ReadyGroups, requests: Sequence[RequestView], mask: int) -> list[Prompts]:
    """Equation 5 solved exactly: requests by length, the longest first, on instances by use."""
    order = sorted(requests, key=lambda r: (-r.known, r.request))
    instances = sorted(members(mask), key=lambda i: (-board.free[i], i))
    at = {instance: index for index, instance in enumerate(instances)}
    shapes: dict[tuple[int, int], Shape] = {}
    for group in ready.covering(requests[0].prefill_phase, 0, mask):
        places = sorted(at[i] for i in group.instances)
        if places[-1] - places[0] == group.dop - 1:
            shapes[places[0], group.dop] = Shape(1 << 40)  # a batch may take several steps
    dops = {dop for _, dop in shapes}
    work = {dop: [Work(r.known, r.known * r.known / 2, 0, 1 / r.known) for r in order] for dop in dops}
    if not dops:
        return []
    pages = [board.pages_needed(r) for r in order]
    cost = board.cost

    def step_s(dop: int, tokens: float, pairs: float, context: float) -> float:
        return cost.prefill_s(dop, int(tokens), pairs, int(context), ContextForm.RING)

    slots = Slots([board.free[i] for i in instances], [0.0] * len(instances), shapes)
    found = Batching(work, pages, slots, step_s).batches(len(order))
    return [
        Prompts(
            tuple(sorted(instances[batch.at : batch.at + batch.dop])),
            [r.request for r in order[batch.first : batch.last]],
            batch.seconds,
        )
        for batch in found
    ]


def take_prompts(board: Board, batch: Prompts, by_id: Mapping[int, RequestView]) -> PlannedPrefill | None:
    """The next step of a batch: all of it, but for what the program or free pages do not take."""
    requests = left(batch, by_id)
    if not requests or not board.idle(batch.instances):
        return None
    mask, page_tokens = mask_of(batch.instances), board.cluster.page_tokens
    requests = [r for r in requests if not kv_mask(r) & ~mask and r.score == requests[0].score]
    if not requests:
        return None
    size = -(-sum(r.known for r in requests) // len(batch.instances))
    bucket = board.bucket(requests[0].prefill_phase, batch.instances, size)
    units = min(len(batch.instances) * (bucket // page_tokens), board.spare(batch.instances))
    rows: list[tuple[RequestView, tuple[Run, ...]]] = []
    for request in requests:
        runs = buckets.take(request.missing, units, page_tokens)
        if not runs or len(rows) == board.cluster.ladder.prefill_rows:
            break
        rows.append((request, runs))
        units -= buckets.num_units(runs, page_tokens)
    if not rows:
        return None
    keep = _packed(board, sum(buckets.num_units(runs, page_tokens) for _, runs in rows), batch.instances)
    planned = tuple(PlannedPrefillRow(request.request, runs) for request, runs in rows)
    return PlannedPrefill(batch.instances, ContextForm.RING, planned, keep, score=requests[0].score)


def _packed(board: Board, num_units: int, instances: Instances) -> tuple[Share, ...]:
    """The fullest first, each filled to the last page."""
    keep: list[Share] = []
    for instance in sorted(instances, key=lambda i: (board.free[i], i)):
        pages = min(num_units, board.free[instance])
        if pages:
            keep.append(Share(instance, pages))
            board.free[instance] -= pages
            num_units -= pages
    return tuple(keep)
