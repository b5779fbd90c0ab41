"""Allocation: which instances prefill may take now, and for how long (LoongServe section 5.2, Eq 1 to 4).

What it is: decode groups yield their instances for as long as their rows stay within their token times: rows that are
ahead of their targets have slack, and a chunk may take it (Eq 1-2, with targets for gains). Where slack is short, rows
go first; where nobody named a target, chunk and step alternate. Small decode groups move into a larger one when that
costs less than the instance time it frees (Eq 3-4): one row behind each step of the larger one, or as rows have time.
What it is not: the DoP of a prefill (`batch.py`), or where rows decode (`scale.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from loong_jax.policy.dispatch import expected_output
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import members
from loong_jax.policy.scale import DecodeGroup
from loong_jax.policy.times import Times
from loong_jax.types import Phase, PlannedMigrate, PlannedPrepare, Program, Rehome, RequestView, Resident

FAR_BEHIND = 20
"""A row so many token times behind its target cannot be brought back; others are not held for it."""
PACE = 0.9
"""Share of a token time that rows are held to: steps end when they end."""
WORTH = 8
"""A chunk beside decodes takes at least so many times the fixed cost of a step, or it is not worth its start."""
FULL = 0.6
"""Share of a token time that a decode group's step may take before no more rows are moved into it."""
GAIN = 0.6
"""Rows move when that costs less than this share of what staying costs: no row moves to and fro (hysteresis)."""


class Allowance(NamedTuple):
    """`open`: instances that may be given a prefill; `budget_s`: of each, how long its rows can wait; `urgent`:
    instances that only a request which may not be passed any more can take."""

    open: int
    urgent: int
    budget_s: list[float]
    home: int  # instances with decode rows


def allowance(draft: Draft, groups: Sequence[DecodeGroup], times: Times) -> Allowance:
    """One prefill at a time on an instance: what comes next is chosen when it is done, with whoever came meanwhile."""
    limits = draft.limits
    free = 0
    for instance in draft.view.instances:
        if instance.prefilling == 0:
            free |= 1 << instance.instance
    free &= draft.room
    chunk_s = limits.chunk_us * 1e-6
    budgets = [float("inf")] * len(draft.view.instances)
    least_s = min(chunk_s, max(WORTH * times.base_s, limits.token_us * 1e-6))
    only_urgent = home = 0
    for group in groups:
        mask = group.mask
        home |= mask
        if not free & mask:
            continue
        slack_s = _slack_s(draft, group, times, least_s)
        if slack_s < least_s:
            if (group.targeted and _reachable(draft, group, times)) or not group.in_flight:
                only_urgent |= mask
            slack_s = least_s
        for instance in members(mask):
            budgets[instance] = min(budgets[instance], slack_s)
    return Allowance(free & ~only_urgent, free & only_urgent, budgets, home)


def _reachable(draft: Draft, group: DecodeGroup, times: Times) -> bool:
    """Whether a step can be as fast as its rows want; else they alternate with prompts, which are not shut out."""
    wanted_us = min(row.target.tpot_us or draft.limits.token_us for row in group.rows)
    return group.step_s(times.cost) * 1e6 < PACE * wanted_us


def _lends(draft: Draft, group: DecodeGroup, times: Times, seconds: float) -> bool:
    """Whether all rows of the group can wait so long, as for a chunk; or cannot be in time anyhow."""
    return _slack_s(draft, group, times, float("inf")) >= seconds or not _reachable(draft, group, times)


def _in_step(group: DecodeGroup) -> bool:
    """Whether a decode step of it is under way: a move has one of its rows, a step most."""
    return 2 * sum([row.in_flight > 0 for row in group.rows]) > len(group.rows)


def _slack_s(draft: Draft, group: DecodeGroup, times: Times, least_s: float) -> float:
    """How long a chunk may take before the group's next step, so that no row falls behind its target."""
    now_us, default_us = draft.view.now_us, draft.limits.token_us
    step_s = group.step_s(times.cost)
    slack_us = lost_s = float("inf")
    for row in group.rows:  # `_ahead_us` written out
        token_us = PACE * (row.target.tpot_us or default_us)
        first_us = row.first_token_us
        ahead_us = (first_us if first_us >= 0 else now_us) + token_us * (row.issued - row.prompt_len) - now_us
        if ahead_us > -FAR_BEHIND * token_us:
            slack_us = min(slack_us, ahead_us)
        else:  # cannot be brought back: it does not hold the others, nor is it pushed much further
            lost_s = least_s
    return min(lost_s, slack_us * 1e-6 - (2 if group.in_flight else 1) * step_s)


def _ahead_us(row: RequestView, token_us: float, now_us: int) -> float:
    """How much later than now its next token is due, at one each `token_us` since its first."""
    first_us = row.first_token_us if row.first_token_us >= 0 else now_us
    return first_us + token_us * (row.issued - row.prompt_len) - now_us


def consolidated(
    draft: Draft, groups: Sequence[DecodeGroup], times: Times, long_homes: int = 0
) -> list[PlannedMigrate]:
    """One row's KV moves, if the instance time that frees is worth the move: of a row that ties two instances together,
    the smaller part; of one beside a long prompt's KV (on `long_homes`), all of it; else the smallest decode group
    joins the largest."""
    planned = _gathered(draft, groups, times)
    if not planned and not draft.held:
        planned = _aside(draft, groups, times, long_homes)
    return planned or ([] if draft.held else _joined(draft, groups, times))


def _aside(draft: Draft, groups: Sequence[DecodeGroup], times: Times, long_homes: int) -> list[PlannedMigrate]:
    """A row leaves the instances of a long prompt, where each chunk would be a short one, and take all that the row is
    ahead: so it need not be ahead for this."""
    left = members(draft.alive & ~long_homes) if long_homes else ()
    if not left:
        return []
    dst = max(left, key=lambda i: (draft.load[i] > 0, draft.free[i], -i))
    for group in groups:
        row = group.rows[0]
        if group.mask & ~long_homes or group.group is None or len(row.resident) != 1:
            continue
        stay_s = (expected_output(row, draft.view.mean_output) - row.num_generated) * times.cost.decode_s(1, 0, 0, 0)
        held = row.resident[0]
        pair = (min(held.instance, dst), max(held.instance, dst))
        if (_program(draft), pair) not in draft.view.ready:
            draft.prepares.append(PlannedPrepare(_program(draft), pair))
        elif _moves_s(draft, times, held.tokens, held.pages) <= GAIN * stay_s * group.mask.bit_count():
            planned = _move(draft, times, row, held, dst, None)
            if planned or draft.held:
                return planned
    return []


def _gathered(draft: Draft, groups: Sequence[DecodeGroup], times: Times) -> list[PlannedMigrate]:
    for group in groups:
        if group.mask.bit_count() < 2:
            continue
        spanning = [row for row in group.rows if len(row.kv) > 1]
        # Towards the other rows: a row that was moved to them in part does not come back.
        rows_on = Counter(instance for row in group.rows for instance in row.kv)
        for row in sorted(spanning, key=lambda row: (len(row.kv), row.request)):
            src, *_, dst = sorted(row.resident, key=lambda r: (rows_on[r.instance], r.pages, r.instance))
            left = expected_output(row, draft.view.mean_output) - row.num_generated
            # A row less that needs them both; when it is the last, every step takes one instance less.
            stay_s = left * times.cost.decode_s(1, 0, 0, 0) / len(spanning)
            if _moves_s(draft, times, src.tokens, src.pages) <= GAIN * stay_s:
                planned = _move(draft, times, row, src, dst.instance, group.step_s(times.cost))
                if planned or draft.held:
                    return planned
    return []


def _joined(draft: Draft, groups: Sequence[DecodeGroup], times: Times) -> list[PlannedMigrate]:
    streams = [group for group in groups if group.mask.bit_count() == 1 and group.group is not None]
    if len(streams) < 2:
        return []
    home = max(streams, key=lambda group: (len(group.rows), -group.rows[0].request))
    (dst,) = members(home.mask)
    token_s = draft.limits.token_us * 1e-6
    if _computes_prompts(draft, home.mask):
        return []
    movable = [group for group in streams if group is not home and not _computes_prompts(draft, group.mask)]
    for group in sorted(movable, key=lambda group: (group.kv_tokens, group.rows[0].request)):
        rows = len(home.rows) + len(group.rows)
        if len(group.rows) > len(home.rows):
            continue
        if times.cost.decode_s(1, rows, rows, home.kv_tokens + group.kv_tokens) > FULL * token_s:
            continue
        stay_s, move_s = _worth(draft, group, times)
        if move_s > GAIN * stay_s:
            continue
        row = group.rows[0]
        if row.resident:
            held = row.resident[0]
            move_s = _moves_s(draft, times, held.tokens, held.pages) / 2
            if not (_in_step(home) or _lends(draft, home, times, move_s)):
                return []  # one move behind each step of the home; more only in time that its rows have
            planned = _move(draft, times, row, held, dst, group.step_s(times.cost))
            if planned or draft.held:
                return planned
    return []


def _computes_prompts(draft: Draft, mask: int) -> bool:
    """Where an instance does, the other of a move would stand still."""
    return any([draft.view.instances[i].prefilling for i in members(mask)])


def _program(draft: Draft) -> Program:
    return Program(Phase.MIGRATE, 2, draft.cluster.ladder.move_pages)


def _move(
    draft: Draft, times: Times, row: RequestView, held: Resident, dst: int, step_s: float | None
) -> list[PlannedMigrate]:
    """The move, if it leaves headroom. Instances that are busy with decode steps keep room for it. `step_s`: of the
    row's decode step, one of which follows the move; None where the row need not be in time for it."""
    src, pages = held.instance, held.pages
    mask = 1 << src | 1 << dst
    token_us = PACE * (row.target.tpot_us or draft.limits.token_us)
    if step_s is not None:
        wait_s = _moves_s(draft, times, held.tokens, pages) / 2 + (2 if row.in_flight else 1) * step_s
        if _ahead_us(row, token_us, draft.view.now_us) < wait_s * 1e6:
            return []  # it has no time for that yet, and may end before it has
    headroom = draft.limits.decode_headroom_pages * (draft.load[dst] + 1)
    if pages + headroom > draft.free[dst] or (_program(draft), (min(src, dst), max(src, dst))) not in draft.view.ready:
        return []
    if mask & draft.taken or _computes_prompts(draft, mask):
        return []
    if mask & ~draft.room:
        draft.held |= mask
        return []
    draft.taken |= mask
    return [PlannedMigrate(Rehome(row.request, src, dst, pages))]


def _worth(draft: Draft, group: DecodeGroup, times: Times) -> tuple[float, float]:
    """Instance seconds of staying apart (the fixed cost of its steps until its rows end), and of moving."""
    mean, num = draft.view.mean_output, len(group.rows)
    longest = max([expected_output(row, mean) - row.num_generated for row in group.rows])
    tokens = group.kv_tokens // num
    move_s = num * _moves_s(draft, times, tokens, tokens // draft.cluster.page_tokens + 1)
    return longest * times.cost.decode_s(1, 0, 0, 0), move_s


def _moves_s(draft: Draft, times: Times, tokens: int, pages: int) -> float:
    """Instance seconds of moving so much KV, in steps of `move_pages`."""
    steps = -(-pages // draft.cluster.ladder.move_pages)
    return 2 * steps * times.cost.migrate_s(tokens // max(1, steps))
