"""A lane: a fixed group of instances that serves its requests as one engine (LoongServe section 7.3).

What it is: continuous batching in order of arrival on one group: prefill first with whole prompts (vLLM 0.3), or a
token budget for each iteration that decodes take from first (Sarathi-Serve, SplitFuse, vLLM today); rows over all
masters or one; the newest evicted for recomputation when memory is short. The baselines are made of lanes.
What it is not: a choice of the group, or of which requests are the lane's: DoP never changes here.

Progress. Let r be the oldest holder of KV. Nothing is admitted into pages that holders of KV still need; when a row
finds no page, the newest holder goes; when the lane has nothing to do at all, the newest holder goes too. So r ends,
and so does every request after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loong_jax import buckets
from loong_jax.cost import row_pairs
from loong_jax.policy import placement
from loong_jax.policy.baselines.board import Board, Instances, future_pages, may_decode, may_prefill
from loong_jax.types import (
    ContextForm,
    Phase,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedEvict,
    PlannedPrefill,
    PlannedPrefillRow,
    RequestView,
    Run,
    Share,
    View,
)


class Rules(NamedTuple):
    """How a lane works. `budget`: tokens of an iteration, decode rows first (0: prompts come first, and whole);
    `batch_tokens`: whole prompts are put together up to so many (0: as many as a program takes); `depth`: steps
    outstanding (1: the host waits for each, 2: it is one step ahead); `single_master`: all rows on one
    instance; `watermark`: share of the pool that admission leaves free; `reserves_output`: admission reserves all of
    `max_tokens`; `decodes`: whether rows are decoded here."""

    budget: int = 0
    batch_tokens: int = 0
    depth: int = 2
    single_master: bool = False
    watermark: float = 0.0
    reserves_output: bool = False
    decodes: bool = True


class LanePlan(NamedTuple):
    prefill: PlannedPrefill | None = None
    decode: PlannedDecode | None = None
    evict: PlannedEvict | None = None


_NOTHING = LanePlan()
_SWITCH_SHARE = 8  # a single master is left when another has a pool's eighth more free


class Lane:
    """`instances`: the group. It keeps the last decode for as long as nothing else happens."""

    def __init__(self, instances: Instances, rules: Rules) -> None:
        self.instances = instances
        self.rules = rules
        self._version = -1  # of the view for which `_again` holds
        self._again: PlannedDecode | None = None
        self._uses = 0
        self._masters: dict[int, int] = {}
        self._resting = -1  # the version of the view at which it had nothing to do
        self._iteration: tuple[int, int] | None = None  # (now_us, decode rows) of an iteration that awaits its prefill

    def busy(self, view: View) -> bool:
        """Whether no plan of this lane can be carried out now."""
        return any(view.instances[i].queued >= self.rules.depth for i in self.instances) and self._iteration is None

    def rests(self, view: View) -> bool:
        """Whether it had nothing to do, and nothing has happened since."""
        return view.version == self._resting

    def again(self, view: View) -> PlannedDecode | None:
        """The decode of the plan before, when nothing but that happened since and pages surely suffice."""
        if self._again is None or view.version != self._version or self._uses <= 0 or self.busy(view):
            return None
        if any(view.instances[master].free_pages < rows for master, rows in self._masters.items()):
            return None
        self._uses -= 1
        return self._again

    def plan(self, board: Board, holders: Sequence[RequestView], fresh: Sequence[RequestView]) -> LanePlan:
        """`holders`: its requests with KV or a step in flight; `fresh`: others that may start here; by arrival."""
        self._again, self._resting = None, -1
        iteration, self._iteration = self._iteration, None
        if iteration is not None and iteration[0] == board.view.now_us:
            return LanePlan(self._prefill(board, holders, fresh, self.rules.budget - iteration[1], []))
        if any(board.queued[i] >= self.rules.depth for i in self.instances):
            return _NOTHING
        rows = [r for r in holders if may_decode(r)] if self.rules.decodes else []
        idle = board.idle(self.instances)
        if self.rules.budget and self._has_prompt(board, holders, fresh, rows):
            # An iteration: decodes, then what the budget leaves for prompts, queued together on an idle group.
            planned = self._iterate(board, holders, fresh, rows) if idle else _NOTHING
        else:
            prefill = None if self.rules.budget else self._prefill(board, holders, fresh, 0, rows)
            planned = LanePlan(prefill) if prefill is not None else self._decode(board, holders, rows)
            if prefill is None and planned.decode is not None:
                self._keep(board, planned.decode, rows)
        if planned == _NOTHING and idle:
            self._resting = board.view.version
            # Where others decode, those that are through only wait to be moved away.
            waits = [r for r in holders if self.rules.decodes or not r.running]
            if waits and not board.prepares:
                return self._make_room(holders)
        return planned

    def _iterate(
        self, board: Board, holders: Sequence[RequestView], fresh: Sequence[RequestView], rows: list[RequestView]
    ) -> LanePlan:
        planned = self._decode(board, holders, rows)
        if planned.decode is not None:
            self._iteration = (board.view.now_us, len(planned.decode.rows))
            return planned
        if planned.evict is not None:
            return planned
        return LanePlan(self._prefill(board, holders, fresh, self.rules.budget, rows))

    def _has_prompt(
        self, board: Board, holders: Sequence[RequestView], fresh: Sequence[RequestView], rows: list[RequestView]
    ) -> bool:
        return any(not r.running for r in holders) or bool(self._admitted(board, holders, fresh, rows))

    def _keep(self, board: Board, decode: PlannedDecode, rows: Sequence[RequestView]) -> None:
        """For `again`: no prompt can start before something else happens, for decoding only takes pages."""
        if len(decode.rows) < len(rows):
            return
        self._version, self._again = board.view.version, decode
        self._uses = min(r.prompt_len + r.max_tokens - r.issued for r in rows) - 1
        self._masters = {}
        for row in decode.rows:
            self._masters[row.master] = self._masters.get(row.master, 0) + 1

    # ---- prefill

    def _admitted(
        self, board: Board, holders: Sequence[RequestView], fresh: Sequence[RequestView], rows: Sequence[RequestView]
    ) -> list[RequestView]:
        """Fresh requests whose prompts fit beside what holders and `rows` need, in order of arrival."""
        if not fresh:
            return []
        pool = len(self.instances) * board.cluster.pages_per_instance
        headroom = max(board.limits.decode_headroom_pages, int(self.rules.watermark * pool))
        left = board.spare(self.instances) - sum(1 for r in rows if r.open_page is None)
        left -= sum(board.pages_needed(r) for r in holders if not r.running)
        most = board.cluster.ladder.decode_rows[-1] * (1 if self.rules.single_master else len(self.instances))
        admitted: list[RequestView] = []
        for request in fresh:
            pages = board.pages_needed(request)
            first = not (holders or admitted)
            if not first and (left < pages + headroom or len(holders) + len(admitted) >= most):
                break
            if not first and self.rules.reserves_output and future_pages(board, (*holders, *admitted, request)) > pool:
                break
            left -= pages
            admitted.append(request)
        return admitted

    def _prefill(
        self,
        board: Board,
        holders: Sequence[RequestView],
        fresh: Sequence[RequestView],
        budget: int,
        rows: Sequence[RequestView],
    ) -> PlannedPrefill | None:
        """In order of arrival, up to `budget` tokens, and with 0 as many whole prompts as the program takes."""
        if self.rules.budget and budget <= 0:
            return None
        candidates = [r for r in holders if may_prefill(r)]
        candidates += self._admitted(board, holders, fresh, rows)
        page_tokens, dop = board.cluster.page_tokens, len(self.instances)
        for head in candidates:
            tokens = sum(run.count for run in head.missing)
            bucket = board.bucket(head.prefill_phase, self.instances, -(-tokens // dop))
            if not bucket:
                continue
            units = min(dop * (bucket // page_tokens), board.spare(self.instances))
            if budget:
                units = min(units, max(1, budget // page_tokens))
            elif self.rules.batch_tokens:
                alone = buckets.num_units(head.missing, page_tokens)
                units = min(units, max(alone, self.rules.batch_tokens // page_tokens))
            batch = self._batch([c for c in candidates if c.score == head.score], units, page_tokens, board)
            if batch:
                return self._place(board, batch)
        return None

    def _batch(
        self, candidates: Sequence[RequestView], units: int, page_tokens: int, board: Board
    ) -> list[tuple[RequestView, tuple[Run, ...]]]:
        batch: list[tuple[RequestView, tuple[Run, ...]]] = []
        for request in candidates[: board.cluster.ladder.prefill_rows]:
            runs = buckets.take(request.missing, units, page_tokens)
            if not runs or (batch and not self.rules.budget and runs[-1].end < request.known):
                break  # prompts stay whole where they can
            batch.append((request, runs))
            units -= buckets.num_units(runs, page_tokens)
        return batch

    def _place(self, board: Board, batch: Sequence[tuple[RequestView, tuple[Run, ...]]]) -> PlannedPrefill:
        """KV stays where it is computed: even shares over the group."""
        free = dict(enumerate(board.free))
        keep: list[Share] = []
        for request, runs in batch:
            num_units = buckets.num_units(runs, board.cluster.page_tokens)
            keep += placement.even(request, num_units, self.instances, free).keep
        planned = tuple(PlannedPrefillRow(request.request, runs) for request, runs in batch)
        return PlannedPrefill(self.instances, self._form(board, batch), planned, tuple(keep), score=batch[0][0].score)

    def _form(self, board: Board, batch: Sequence[tuple[RequestView, tuple[Run, ...]]]) -> ContextForm:
        context = sum(resident.tokens for request, _ in batch for resident in request.resident)
        dop = len(self.instances)
        if dop == 1 or context == 0:
            return ContextForm.RING
        tokens = sum(run.count for _, runs in batch for run in runs)
        pairs = sum(
            row_pairs(sum(run.count for run in runs), sum(resident.tokens for resident in request.resident))
            for request, runs in batch
        )
        ring_s = board.cost.prefill_s(dop, tokens, pairs, context, ContextForm.RING)
        gather_s = board.cost.prefill_s(dop, tokens, pairs, context, ContextForm.GATHER_Q)
        return ContextForm.GATHER_Q if gather_s < ring_s else ContextForm.RING

    # ---- decode

    def _decode(self, board: Board, holders: Sequence[RequestView], rows: Sequence[RequestView]) -> LanePlan:
        if not rows:
            return _NOTHING
        masters = 1 if self.rules.single_master else len(self.instances)
        bucket = board.bucket(Phase.DECODE, self.instances, -(-len(rows) // masters))
        if not bucket:
            return _NOTHING
        planned, needy = (self._one_master if self.rules.single_master else self._masters_of)(board, rows, bucket)
        if needy is not None:
            newest = holders[-1]
            if newest.request > needy.request or len(holders) == 1:
                if newest.in_flight == 0:
                    return LanePlan(evict=PlannedEvict(newest.request))
                planned = [row for row in planned if row.request != newest.request]  # its steps must come back first
        return LanePlan(decode=PlannedDecode(self.instances, tuple(planned))) if planned else _NOTHING

    def _masters_of(
        self, board: Board, rows: Sequence[RequestView], bucket: int
    ) -> tuple[list[PlannedDecodeRow], RequestView | None]:
        """A row goes on where its open page is, else where the fewest rows are. Also the oldest row without a page."""
        free, instances = list(board.free), self.instances
        counts = dict.fromkeys(instances, 0)
        planned: list[PlannedDecodeRow] = []
        needy: RequestView | None = None
        for row in rows:
            device, tail = row.device_group, row.open_page
            if tail is not None:
                master = tail[0]
                if counts[master] >= bucket or (device and master not in device):
                    continue
            else:
                spare = [i for i in instances if free[i] > 0]
                if not spare:
                    needy = needy or row
                    continue
                spare = [i for i in spare if counts[i] < bucket and (not device or i in device)]
                if not spare:
                    continue  # waits for the host, or for rows to leave
                master = min(spare, key=lambda i: (counts[i], -free[i], i)) if len(spare) > 1 else spare[0]
                free[master] -= 1
            counts[master] += 1
            planned.append(PlannedDecodeRow(row.request, master))
        return planned, needy

    def _one_master(
        self, board: Board, rows: Sequence[RequestView], bucket: int
    ) -> tuple[list[PlannedDecodeRow], RequestView | None]:
        """All rows on the instance with the most free pages. It stays that until another has far more: with every
        change all rows open a page."""
        tails = [row.open_page for row in rows]
        open_on = dict.fromkeys(self.instances, 0)
        for tail in tails:
            if tail is not None:
                open_on[tail[0]] += 1
        free = board.free
        emptiest = max(self.instances, key=lambda i: (free[i], -i))
        master = max(self.instances, key=lambda i: (open_on[i], free[i], -i))
        needs_page = sum(1 for tail in tails if tail is None or tail[0] != master)
        slack = board.cluster.pages_per_instance // _SWITCH_SHARE
        if free[master] < needs_page or free[emptiest] - free[master] > slack:
            master = emptiest
        left = free[master]
        planned: list[PlannedDecodeRow] = []
        needy: RequestView | None = None
        for row, tail in zip(rows, tails, strict=True):
            if len(planned) == bucket:
                break
            if row.device_group and master not in row.device_group:
                continue
            if tail is None or tail[0] != master:
                if left == 0:
                    needy = needy or row
                    continue
                left -= 1
            planned.append(PlannedDecodeRow(row.request, master))
        return planned, needy

    @staticmethod
    def _make_room(holders: Sequence[RequestView]) -> LanePlan:
        """Nothing can be done: the newest holder leaves its pages to those before it (or takes whole ones itself)."""
        newest = holders[-1]
        return LanePlan(evict=PlannedEvict(newest.request)) if newest.in_flight == 0 and newest.resident else _NOTHING
