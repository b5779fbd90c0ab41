"""A policy that picks at random, within the rules: groups, chunks, retention splits, masters, context form, re-homing,
migrations and evictions. What is legal must be right, so whatever it picks, tokens must not change.

When it picks nothing while nothing runs, the ordinary policy plans instead, so that every schedule comes to an end.
"""

from __future__ import annotations

import random

from loong_jax import buckets
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.elastic import Elastic
from loong_jax.types import (
    ContextForm,
    Phase,
    Plan,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedEvict,
    PlannedMigrate,
    PlannedPrefill,
    PlannedPrefillRow,
    Program,
    Rehome,
    RequestView,
    Run,
    Share,
    View,
)


class ChaosPolicy:
    """`seed` makes the choices reproducible: a replay with a fresh object of the same seed plans the same."""

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig, seed: int) -> None:
        self.cluster = cluster
        self.limits = limits
        self._rng = random.Random(seed)
        self._fallback = Elastic(cluster, limits)
        # Some schedules lean to one kind of choice.
        self._p_evict = self._rng.choice((0.0, 0.02, 0.05))
        self._p_migrate = self._rng.choice((0.0, 0.1, 0.3))
        self._p_rehome = self._rng.choice((0.0, 0.3, 0.8))
        self._p_aligned = self._rng.choice((0.0, 0.5, 1.0))
        self._p_sane = self._rng.choice((0.0, 0.2))

    def plan(self, view: View, cost: CostModel) -> Plan:
        idle = all(i.queued == 0 for i in view.instances if i.alive)
        if self._rng.random() < self._p_sane:
            return self._fallback.plan(view, cost)
        plan = self._random_plan(view)
        return self._fallback.plan(view, cost) if plan == Plan() and idle else plan

    def _random_plan(self, view: View) -> Plan:
        rng = self._rng
        evictable = [r for r in view.requests if r.in_flight == 0 and r.resident]
        if evictable and rng.random() < self._p_evict:
            return Plan(evicts=(PlannedEvict(rng.choice(evictable).request),))
        room = {i.instance for i in view.instances if i.alive and i.queued < 2}
        free = {i.instance: i.free_pages for i in view.instances}
        waiting = {r.request for r in view.requests}
        migrates, prefills, decodes = [], [], []
        if rng.random() < self._p_migrate:
            migrate = self._migrate(view, room, free)
            if migrate is not None:
                migrates.append(migrate)
                room -= {migrate.rehome.src, migrate.rehome.dst}
                waiting.discard(migrate.rehome.request)
        steps = (Phase.PREFILL, Phase.DECODE, Phase.SCORE)
        groups = sorted({(p.phase, i) for p, i in view.ready if p.phase in steps})
        rng.shuffle(groups)
        for phase, instances in groups:
            if not set(instances) <= room or rng.random() < 0.2:
                continue
            inside = [
                r for r in view.requests if r.request in waiting and all(x.instance in instances for x in r.resident)
            ]
            if phase is Phase.DECODE:
                planned = self._decode(view, instances, inside, free)
                decodes += [planned] if planned else []
            else:
                inside = [r for r in inside if r.prefill_phase is phase]
                planned = self._prefill(view, phase, instances, inside, free)
                prefills += [planned] if planned else []
            if planned is not None:
                room -= set(instances)
                waiting -= {row.request for row in planned.rows}
        return Plan(migrates=tuple(migrates), prefills=tuple(prefills), decodes=tuple(decodes))

    def _migrate(self, view: View, room: set[int], free: dict[int, int]) -> PlannedMigrate | None:
        rng = self._rng
        movable = [(r.request, x) for r in view.requests for x in r.resident if x.instance in room]
        if not movable:
            return None
        request, resident = rng.choice(movable)
        targets = [
            i for i in sorted(room)
            if i != resident.instance and free[i] > 0
            and (Program(Phase.MIGRATE, 2, self.cluster.ladder.move_pages), tuple(sorted((i, resident.instance))))
            in view.ready
        ]  # fmt: skip
        if not targets:
            return None
        dst = rng.choice(targets)
        pages = rng.randint(1, min(resident.pages, free[dst]))
        free[dst] -= pages
        return PlannedMigrate(Rehome(request, resident.instance, dst, pages))

    def _decode(
        self, view: View, instances: tuple[int, ...], inside: list[RequestView], free: dict[int, int]
    ) -> PlannedDecode | None:
        rng, rows = self._rng, []
        largest = max(p.bucket for p, i in view.ready if p.phase is Phase.DECODE and i == instances)
        counts = dict.fromkeys(instances, 0)
        for request in inside:
            if not request.running or request.issued >= request.prompt_len + request.max_tokens or rng.random() < 0.15:
                continue
            allowed = [i for i in instances if not request.device_group or i in request.device_group]
            open_at = request.open_page[0] if request.open_page else -1
            allowed = [i for i in allowed if counts[i] < largest and (free[i] > 0 or i == open_at)]
            if not allowed:
                continue
            # Mostly the open page: otherwise every token takes a page.
            master = open_at if open_at in allowed and rng.random() < 0.7 else rng.choice(allowed)
            free[master] -= master != open_at
            counts[master] += 1
            rows.append(PlannedDecodeRow(request.request, master))
        rng.shuffle(rows)
        return PlannedDecode(instances, tuple(rows)) if rows else None

    def _prefill(
        self, view: View, phase: Phase, instances: tuple[int, ...], inside: list[RequestView], free: dict[int, int]
    ) -> PlannedPrefill | None:
        rng, page_tokens = self._rng, view.page_tokens
        largest = max(p.bucket for p, i in view.ready if p.phase is phase and i == instances)
        budget = min(len(instances) * (largest // page_tokens), sum(free[i] for i in instances))
        budget = rng.randint(min(1, budget), budget)
        rows: list[PlannedPrefillRow] = []
        units = 0
        for request in rng.sample(inside, len(inside)):
            left = budget - units
            if request.in_flight or not request.missing or left <= 0 or len(rows) == self.cluster.ladder.prefill_rows:
                continue
            runs = self._runs(request, left, page_tokens)
            if runs:
                rows.append(PlannedPrefillRow(request.request, runs))
                units += buckets.num_units(runs, page_tokens)
        if not rows:
            return None
        keep = []
        left = units
        while left:
            instance = rng.choice([i for i in instances if free[i] > 0])
            pages = rng.randint(1, min(left, free[instance]))
            keep.append(Share(instance, pages))
            free[instance] -= pages
            left -= pages
        rehome = []
        chosen = {row.request for row in rows}
        for request in inside:
            for resident in request.resident:
                targets = [i for i in instances if i != resident.instance and free[i] > 0]
                if request.request in chosen and targets and rng.random() < self._p_rehome:
                    dst = rng.choice(targets)
                    pages = rng.randint(1, min(resident.pages, free[dst]))
                    free[dst] -= pages
                    rehome.append(Rehome(request.request, resident.instance, dst, pages))
        form = ContextForm.RING if rehome else rng.choice((ContextForm.RING, ContextForm.GATHER_Q))
        return PlannedPrefill(instances, form, tuple(rows), tuple(keep), tuple(rehome), phase is Phase.SCORE)

    def _runs(self, request: RequestView, max_units: int, page_tokens: int) -> tuple[Run, ...]:
        """Some first part of what is missing; the cut may fall anywhere, or on a page boundary."""
        rng, out = self._rng, []
        total = sum(run.count for run in request.missing)
        tokens = total if rng.random() < 0.4 else rng.randint(1, total)
        if rng.random() < self._p_aligned and tokens < total:
            tokens = max(1, tokens - tokens % page_tokens)
        for run in request.missing:
            count = min(run.count, tokens, max_units * page_tokens)
            if count <= 0:
                break
            out.append(Run(run.first, count))
            tokens -= count
            max_units -= -(-count // page_tokens)
            if count < run.count:
                break
        return tuple(out)
