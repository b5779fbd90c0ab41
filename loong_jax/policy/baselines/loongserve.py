"""LoongServe as it was published: its four steps and its macro-iterations (LoongServe sections 3.2 to 4.4).

What it is: rounds. Between rounds all batches decode in lock-step. Every `wait_iterations`, or when nothing decodes, a
round begins: requests are dispatched, decode batches packed together by migration, instances taken from decode batches
that lose less than prompts gain, prompts batched, KV kept on the fewest instances, full, and no room left for decoding.
Until all prompts of the round are through, the other batches decode on without help, and idle instances only take
prompts that end before the round is predicted to.
What it is not: the released program: where its decisions can be no plan, these differ.
* Memory is counted in pages, not tokens; a row keeps to its open page where it can (3.2).
* Batches are those requests whose KV shares an instance now; they part when that ends, and the released ones never do.
* In a round, decode batches need not wait for each other; every idle instance is filled, and looked at when something
  happens, not every 10 ms (4.3, step 6).
* Only groups with READY programs; prompts beyond the largest program go in several steps; the scan of the queue ends
  after 256 requests; KV that was lost in part is computed again whole.
* Transfers that wait for attention, host work between steps and eager launches belong to the hardware it is run on.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.baselines import loongserve_decode as decoding
from loong_jax.policy.baselines.board import Board, Buckets, Instances, kv_mask, may_decode
from loong_jax.policy.baselines.loongserve_dispatch import Constants, Dispatch, prefill_s
from loong_jax.policy.baselines.loongserve_round import Prompts, Round, split, take_prompts
from loong_jax.policy.groups import ReadyGroups, mask_of, members
from loong_jax.types import (
    Phase,
    Plan,
    PlannedDecode,
    PlannedEvict,
    PlannedMigrate,
    Rehome,
    RequestView,
    View,
)

_NOTHING = Plan()
_MAX_PACKS = 64
"""Migrations in a row before a round begins."""


class LoongServe:
    """One object per manager. Unlike other policies it remembers a decision: the round under way."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig, constants: Constants) -> None:
        self.cluster, self.limits, self.constants = cluster, limits, constants
        self._buckets = Buckets()
        self._groups = ReadyGroups(frozenset())
        self._ready: object = None
        self._living = -1
        self._round: Round | None = None
        self._iterations = 0  # of decoding since the last round
        self._out_of_order = 0  # rounds in a row that passed a request
        self._packs = 0
        self._outputs = (float(constants.output_tokens), 1)  # tokens and number of requests that ended
        self._seen: dict[int, int] = {}
        self._version = -1
        self._again: tuple[PlannedDecode, ...] = ()
        self._uses = 0

    def plan(self, view: View, cost: CostModel) -> Plan:
        if self._again and view.version == self._version:
            plan = self._decode_again(view)
            if plan is not None:
                return plan
        self._again = ()
        if view.ready is not self._ready:
            self._ready, self._groups = view.ready, ReadyGroups(view.ready)
            self._buckets.refresh(view.ready)
        board = Board(self.cluster, self.limits, self._buckets, view, cost)
        if board.living != self._living:
            self._living, self._round = board.living, None
        idle = board.idle(members(board.living))
        if not board.living or (self._round is None and not idle):
            return _NOTHING
        requests = view.requests
        board.unstarted = {r.request for r in requests[len(view.active) :]}
        self._learn(requests)
        holders = [r for r in requests if r.resident or r.in_flight]
        fresh = [r for r in requests if not (r.resident or r.in_flight)]
        if self._round is not None:
            plan = self._in_round(board, self._round, holders, fresh)
            if plan is not None:
                return plan
            self._round, self._iterations = None, 0
        return self._between(board, holders, fresh) if idle else _NOTHING

    def _learn(self, requests: Sequence[RequestView]) -> None:
        """Output lengths of requests that ended, from when they were last seen."""
        now = {r.request: r.num_generated for r in requests}
        tokens, count = self._outputs
        for request, generated in self._seen.items():
            if request not in now and generated:
                tokens, count = tokens + generated, count + 1
        self._seen, self._outputs = now, (tokens, count)

    # ---- between rounds

    def _decode_again(self, view: View) -> Plan | None:
        """The same step again, for nothing but that happened; None when pages may be short, or a round is due."""
        if any(i.queued for i in view.instances if i.alive):
            return _NOTHING
        self._uses -= 1
        short = any(
            view.instances[master].free_pages < len(decode.rows)
            for decode in self._again
            for master in {row.master for row in decode.rows}
        )
        if self._uses < 0 or short:
            return None
        self._iterations += 1
        return Plan(decodes=self._again)

    def _between(self, board: Board, holders: list[RequestView], fresh: list[RequestView]) -> Plan:
        broken = [r for r in holders if not r.running and r.in_flight == 0]
        if broken:
            return _evict(broken)
        # A step on an instance that was lost may still be under way.
        rows = [r for r in holders if may_decode(r) and r.in_flight == 0]
        if fresh and (not rows or self._iterations >= self.constants.wait_iterations):
            plan = self._begin(board, rows, holders, fresh)
            if plan is not None:
                return plan
            self._iterations = 0
        plan = self._lock_step(board, rows)
        if plan == _NOTHING and holders and not board.prepares:
            return _evict(holders[-1:])
        return plan

    def _lock_step(self, board: Board, rows: list[RequestView]) -> Plan:
        """All batches decode; the newest request goes when one finds no page."""
        batches, stuck = decoding.batches(board, self._groups, rows)
        if stuck and not board.prepares:
            return _evict(stuck)
        extra = decoding.idle_mask(board)
        batches, extra = decoding.with_memory(board, self._groups, batches, extra)
        for batch in batches:
            extra &= ~self._divide(board, batch, extra)
            if batch.needy and len(rows) > 1:
                return _evict(rows[-1:])
        decodes = tuple(d for d in (batch.decode() for batch in batches) if d is not None)
        if not decodes:
            return Plan(prepares=tuple(board.prepares))
        self._iterations += 1
        if sum(len(d.rows) for d in decodes) == len(rows) and not board.prepares:
            self._version, self._again = board.view.version, decodes
            left = min(r.prompt_len + r.max_tokens - r.issued for r in rows) - 1
            waits = len(board.view.requests) > len(rows)
            self._uses = min(left, self.constants.wait_iterations - self._iterations) if waits else left
        return Plan(decodes=decodes, prepares=tuple(board.prepares))

    def _divide(self, board: Board, batch: decoding.DecodeBatch, extra: int) -> int:
        c = self.constants
        return decoding.divide(board, batch, c.master_rows, not c.one_batch, extra, self._groups)

    # ---- a round begins

    def _begin(
        self, board: Board, rows: list[RequestView], holders: list[RequestView], fresh: list[RequestView]
    ) -> Plan | None:
        """Dispatch, allocate, batch. None when nothing starts."""
        c = self.constants
        mean_output = self._outputs[0] / self._outputs[1]
        dispatch = Dispatch(board, c, rows, mean_output, self._out_of_order < c.max_out_of_order)
        chosen = dispatch.choose([r for r in fresh if r.score == fresh[0].score])
        self._out_of_order = self._out_of_order + 1 if chosen.out_of_order else 0
        requests = chosen.requests or ([] if holders else fresh[:1])
        if not requests:
            return None
        migrates = self._pack(board, rows, requests) if self._packs < _MAX_PACKS else []
        if migrates:
            self._packs += 1
            return Plan(migrates=tuple(migrates), prepares=tuple(board.prepares))
        self._packs = 0
        mask, suspended = self._allocate(board, rows, requests)
        prompts = split(board, self._groups, requests, mask, one_batch=c.one_batch)
        if not prompts:
            return Plan(prepares=tuple(board.prepares)) if board.prepares else None
        budget_s = max(batch.seconds for batch in prompts)
        self._round = Round(prompts, suspended, board.view.now_us + int(budget_s * 1e6))
        plan = self._in_round(board, self._round, holders, fresh)
        if plan is None:
            self._round = None
        return plan

    def _pack(self, board: Board, rows: list[RequestView], requests: list[RequestView]) -> list[PlannedMigrate]:
        """Decode batches on fewer instances: the least used one is emptied into the fullest with room, as far as that
        is needed, or pays (equations 3 and 4)."""
        pages = board.cluster.pages_per_instance
        used = {i: pages - board.free[i] for i in members(board.living) if board.free[i] < pages}
        needed = sum(map(board.pages_needed, requests))
        least = -(-sum(used.values()) // pages)
        if len(used) <= least or needed > pages * (board.living.bit_count() - least):
            return []
        idle = board.living.bit_count() - len(used)
        source = min(used, key=lambda i: (used[i], i))
        if needed <= idle * pages:
            tokens, squares = _lengths(requests)
            gain_s = prefill_s(board, idle, tokens, squares) - prefill_s(board, idle + 1, tokens, squares)
            held = sum(x.tokens for r in rows for x in r.resident if x.instance == source)
            if gain_s < board.cost.migrate_s(held):
                return []
        for row in reversed(rows):  # a pair takes one request at a time
            held = next((x for x in row.resident if x.instance == source), None)
            if held is None:
                continue
            for target in sorted(used, key=lambda i: (board.free[i], i)):
                pair = (min(source, target), max(source, target))
                if target == source or not board.free[target]:
                    continue
                if board.bucket(Phase.MIGRATE, pair, board.cluster.ladder.move_pages):
                    count = min(held.pages, board.free[target])
                    return [PlannedMigrate(Rehome(row.request, source, target, count))]
        return []

    def _allocate(self, board: Board, rows: list[RequestView], requests: list[RequestView]) -> tuple[int, set[int]]:
        """Instances for prompts: the idle ones, those of batches that must stop, and of those for which it pays. Also
        the requests that stop."""
        mask = decoding.idle_mask(board)
        batches, _ = decoding.batches(board, self._groups, rows)
        needed = sum(map(board.pages_needed, requests))
        tokens, squares = _lengths(requests)
        urgency = sum(1 / r.known for r in requests)
        suspended: set[int] = set()

        def stop(batch: decoding.DecodeBatch) -> None:
            nonlocal mask
            mask |= batch.group.mask
            suspended.update(r.request for r in batch.rows)
            batches.remove(batch)

        batches.sort(key=lambda batch: -board.spare(batch.group.instances))
        while batches and board.spare(members(mask)) < needed:
            stop(batches[0])
        for batch in list(batches):
            wider = mask | batch.group.mask
            shorter_s = prefill_s(board, wider.bit_count(), tokens, squares)
            gain = (prefill_s(board, mask.bit_count(), tokens, squares) - shorter_s) * urgency
            outputs = max(1, sum(r.num_generated for r in batch.rows))
            if gain >= shorter_s * len(batch.rows) * len(batch.rows) / outputs:
                stop(batch)
        return mask, suspended

    # ---- in a round

    def _in_round(
        self, board: Board, current: Round, holders: list[RequestView], fresh: list[RequestView]
    ) -> Plan | None:
        """Prompts of the round, decodes beside them, prompts that fit into what is left of it. None when it is over."""
        by_id = {r.request: r for r in (*holders, *fresh)}
        prefills = [p for p in (take_prompts(board, batch, by_id) for batch in current.prompts) if p is not None]
        busy = mask_of(i for p in prefills for i in p.instances) | current.prefilling(board, by_id)
        if not busy:
            return None
        open_ids = current.open_ids(by_id)
        free = decoding.idle_mask(board) & ~busy
        if free and fresh:
            more = self._fill(board, current, [r for r in fresh if r.request not in open_ids], free)
            if more is not None:
                current.prompts.append(more)
                planned = take_prompts(board, more, by_id)
                if planned is not None:
                    prefills.append(planned)
                    busy |= mask_of(planned.instances)
        rows = [r for r in holders if may_decode(r) and r.request not in current.suspended and not kv_mask(r) & busy]
        decodes: list[PlannedDecode] = []
        batches, _ = decoding.batches(board, self._groups, rows)
        for batch in batches:
            if not batch.group.mask & busy and board.idle(batch.group.instances):
                self._divide(board, batch, 0)
                decode = batch.decode()
                if decode is not None:
                    decodes.append(decode)
                    busy |= batch.group.mask
        if not (prefills or decodes or board.prepares) and board.idle(members(board.living)):
            return None  # what is left of it cannot be done
        return Plan(prefills=tuple(prefills), decodes=tuple(decodes), prepares=tuple(board.prepares))

    def _fill(self, board: Board, current: Round, waiting: list[RequestView], idle: int) -> Prompts | None:
        """Greedy fill: whoever waits, in any order, whose prompt ends before the round is predicted to."""
        left_s = (current.until_us - board.view.now_us) * 1e-6
        group: Instances = ()
        for candidate in self._groups.covering(Phase.PREFILL, 0, idle):
            group = candidate.instances
        places = len(board.unstarted) - sum(1 for b in current.prompts for r in b.requests if r in board.unstarted)
        if left_s <= 0 or not group or places <= 0:
            return None
        taken: list[RequestView] = []
        pages, tokens, squares = board.spare(group), 0, 0.0
        for request in waiting[:places]:
            need, length = board.pages_needed(request), request.known
            if request.score or need > pages:
                continue
            if prefill_s(board, len(group), tokens + length, squares + length * length) <= left_s:
                taken.append(request)
                pages, tokens, squares = pages - need, tokens + length, squares + length * length
        return Prompts(group, [r.request for r in taken], 0.0) if taken else None


def _evict(requests: Sequence[RequestView]) -> Plan:
    return Plan(evicts=tuple(PlannedEvict(r.request) for r in requests if r.in_flight == 0))


def _lengths(requests: Sequence[RequestView]) -> tuple[int, float]:
    """Tokens in all, and squares of lengths in all."""
    return sum(r.known for r in requests), float(sum(r.known * r.known for r in requests))
