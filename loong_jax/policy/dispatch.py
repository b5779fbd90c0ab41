"""Dispatch: which requests get prefill now, in what order, and whether memory will do (LoongServe section 5.1).

What it is: the waiting line, by how much a second is worth (normalised latency: the shortest first; then priority and
targets), with ageing that bounds how long any request can be passed; and the future-memory test over the pooled
capacity, with an honest estimate of output lengths.
What it is not: a choice of instances (`allocate.py`, `batch.py`), or of who is evicted (`draft.py`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from loong_jax.config import LimitsConfig
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import members
from loong_jax.types import RequestView

STRETCH = 25
"""A request without a target of its own is urgent after so many times the time it takes alone (LoongServe 7.1)."""
LATE = 4
"""One that missed its target is urgent again after so many times the target: late, it still ends."""
MARGIN = 0.15
"""A request is urgent when what is left of its target, beyond the time that it takes, is this share of it."""


class Candidate(NamedTuple):
    """`tokens` to compute, `seconds` of them alone on the largest group, `weight` of a second's delay; `urgent`: it may
    not be passed any more; `begun`: it has its place among the running ones."""

    request: RequestView
    tokens: int
    seconds: float
    weight: float
    urgent: bool
    begun: bool = False


class _Entry(NamedTuple):
    request: RequestView
    tokens: int
    seconds: float
    weight: float
    rank: tuple[float, float, int]
    latest_us: float


Seconds = Callable[[int, int], float]
"""Predicted seconds of (new tokens, resident ones) alone, on the largest group."""


def weight_of(request: RequestView) -> float:
    """What a second of delay costs a request: normalised latency."""
    return 2.0**request.target.priority / request.known


def rank_of(request: RequestView, seconds: float) -> tuple[float, float, int]:
    """Smith's rule for normalised latency: the least work per weight first."""
    return (-request.target.priority, seconds * request.known, request.request)


def target_us(request: RequestView, seconds: float, limits: LimitsConfig) -> float:
    """How long it may take to its first token."""
    return request.target.ttft_us or max(limits.patience_us, STRETCH * seconds * 1e6)


def urgent(now_us: float, arrived_us: int, target: float, seconds: float) -> bool:
    """Whether it is due: about to miss its target, or far behind it. In between it waits like others: what is missed
    cannot be saved, what others still may reach can."""
    latest_us = arrived_us + target - seconds * 1e6
    return latest_us - MARGIN * target <= now_us < latest_us or now_us >= arrived_us + LATE * target


class Line:
    """The waiting requests, ranked. It follows the view by what changed: a look costs those who came and went."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._entries: dict[int, _Entry] = {}
        self._ranked: list[tuple[float, float, int]] = []
        self._alarms: list[tuple[float, int, bool]] = []  # when a request becomes urgent (or no longer is)
        self._urgent: dict[int, None] = {}
        self._seen: Sequence[RequestView] = ()
        self._last = -1
        self.weight = 0.0

    def clear(self) -> None:
        self.__init__(self._limits)

    def follow(self, waiting: Sequence[RequestView], seconds_of: Seconds) -> None:
        """Take in who came. Who left is noticed when its turn comes."""
        if waiting is self._seen:
            return
        self._seen = waiting
        new: list[RequestView] = []
        for request in reversed(waiting):
            if request.request <= self._last:
                break
            new.append(request)
        for request in reversed(new):
            self._add(request, seconds_of)
        if len(self._entries) < len(waiting) or len(self._entries) > 2 * len(waiting) + 64:
            self.clear()
            self._seen = waiting
            for request in waiting:
                self._add(request, seconds_of)

    def _add(self, request: RequestView, seconds_of: Seconds) -> None:
        seconds = seconds_of(request.known, 0)
        rank, weight = rank_of(request, seconds), weight_of(request)
        target = target_us(request, seconds, self._limits)
        latest_us = request.arrived_us + target - seconds * 1e6
        self._entries[request.request] = _Entry(request, request.known, seconds, weight, rank, latest_us)
        insort(self._ranked, rank)
        heapq.heappush(self._alarms, (latest_us - MARGIN * target, request.request, True))
        heapq.heappush(self._alarms, (latest_us, request.request, False))
        heapq.heappush(self._alarms, (request.arrived_us + LATE * target, request.request, True))
        self.weight += weight
        self._last = max(self._last, request.request)

    def _waits(self, request: int) -> bool:
        at = bisect_left(self._seen, request, key=_number)
        return at < len(self._seen) and self._seen[at].request == request

    def _drop(self, request: int) -> None:
        entry = self._entries.pop(request)
        del self._ranked[bisect_left(self._ranked, entry.rank)]
        self._urgent.pop(request, None)
        self.weight = self.weight - entry.weight if self._entries else 0.0

    def top(self, now_us: int, count: int) -> list[Candidate]:
        """The first `count`: the urgent ones by how soon they must start, then by rank."""
        while self._alarms and self._alarms[0][0] <= now_us:
            _, request, due = heapq.heappop(self._alarms)
            if due and request in self._entries:
                self._urgent[request] = None
            else:
                self._urgent.pop(request, None)
        for request in [r for r in self._urgent if not self._waits(r)]:
            self._drop(request)
        due = sorted(self._urgent, key=lambda r: (self._entries[r].latest_us, r))[:count]
        out = [self._candidate(request, urgent=True) for request in due]
        at = 0
        while at < len(self._ranked) and len(out) < count:
            request = self._ranked[at][-1]
            if not self._waits(request):
                self._drop(request)
                continue
            at += 1
            if request not in self._urgent:
                out.append(self._candidate(request, urgent=False))
        return out

    def _candidate(self, request: int, urgent: bool) -> Candidate:
        entry = self._entries[request]
        return Candidate(entry.request, entry.tokens, entry.seconds, entry.weight, urgent)


def _number(request: RequestView) -> int:
    return request.request


def under_way(
    requests: Iterable[RequestView], now_us: int, seconds_of: Seconds, limits: LimitsConfig
) -> list[Candidate]:
    """Those that began, or lost KV, as candidates."""
    out: list[Candidate] = []
    for request in requests:
        tokens = sum(run.count for run in request.missing)
        seconds = seconds_of(tokens, max(0, request.known - tokens))
        due = urgent(now_us, request.arrived_us, target_us(request, seconds, limits), seconds)
        out.append(Candidate(request, tokens, seconds, weight_of(request), due, begun=True))
    return out


def in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Urgent ones first, the oldest of them before others; then by rank."""
    return sorted(candidates, key=_position)


def _position(candidate: Candidate) -> tuple[bool, float, float, int]:
    request = candidate.request
    if candidate.urgent:
        return (False, -request.target.priority, request.arrived_us, request.request)
    return (True, *rank_of(request, candidate.seconds))


def expected_output(request: RequestView, mean: float) -> float:
    """Tokens it will generate in all, as far as anyone can know: the mean of those who ended, more once it is past
    that, never more than it may."""
    return min(request.max_tokens, max(mean, 1.25 * request.num_generated + 8))


class Memory:
    """The future-memory test: will the pool do until all who were admitted end? A request's pages grow by its expected
    output; when shorter ones end, their pages serve the others."""

    def __init__(self, draft: Draft, active: Sequence[RequestView]) -> None:
        self._draft = draft
        view = draft.view
        alive = members(draft.alive)
        self._page_tokens = view.page_tokens
        self._mean_output = view.mean_output
        self._capacity = sum(view.instances[i].num_pages for i in alive)
        self._left = sum(draft.free[i] for i in alive)
        self._growth: list[tuple[float, int]] = []  # (pages yet to come, pages when its prompt is through)
        self._sum = 0.0
        self._running: list[RequestView] = []  # these have all their KV
        for request in active:
            if request.running:
                self._running.append(request)
            elif request.kv or request.in_flight:  # else evicted: it must be admitted again
                missing = draft.pages_needed(request)
                self._left -= missing
                self._note(request, sum(resident.pages for resident in request.resident) + missing)
        self._holders = len(self._running) + len(self._growth)
        self._left -= len(self._running)
        self._sum += self._most_pages()
        self._is_exact = False

    def _most_pages(self) -> float:
        """No fewer than the running ones will hold: often that is few enough, and nobody looks closer."""
        issued = sum([request.issued for request in self._running])
        generated = issued - sum([request.prompt_len for request in self._running])
        num = len(self._running)
        return 2 * num + (issued + num * (self._mean_output + 8) + 0.25 * generated) / self._page_tokens

    def _look_closer(self) -> None:
        self._is_exact = True
        self._growth += [(self._future(r), -(-r.issued // self._page_tokens)) for r in self._running]
        self._sum = sum([growth + pages for growth, pages in self._growth])

    def _note(self, request: RequestView, pages: int) -> None:
        growth = self._future(request)
        self._growth.append((growth, pages))
        self._sum += growth + pages

    def _future(self, request: RequestView) -> float:
        """Pages that its output will take; none where a window drops as many behind it."""
        if self._draft.cluster.kv_window:
            return 1.0
        expected = expected_output(request, self._mean_output)
        return max(1.0, (expected - request.num_generated) / self._page_tokens)

    def admits(self, request: RequestView) -> bool:
        """Whether a fresh request may start; then it counts as started."""
        pages = self._draft.pages_needed(request)
        headroom = self._draft.limits.decode_headroom_pages
        if self._holders and (self._left < pages + headroom or not self._peak_fits(request, pages)):
            return False
        self._left -= pages
        self._holders += 1
        self._note(request, pages)
        return True

    def _peak_fits(self, request: RequestView, pages: int) -> bool:
        growth = self._future(request)
        if not self._is_exact and self._sum + growth + pages > self._capacity:
            self._look_closer()
        if self._sum + growth + pages <= self._capacity:
            return True  # even if none ended before the others
        held = peak = 0.0
        for position, (more, now) in enumerate(sorted([*self._growth, (growth, pages)], reverse=True), start=1):
            held += now
            peak = max(peak, more * position + held)
        return peak <= self._capacity


def admitted(
    draft: Draft, active: Sequence[RequestView], candidates: Sequence[Candidate], places: int
) -> list[Candidate]:
    """Those under way go on; a fresh one starts when there is a place and memory for it. One that lacks memory is
    passed by lighter ones, until it is urgent."""
    memory: Memory | None = None
    out: list[Candidate] = []
    fresh = True
    for candidate in candidates:
        request = candidate.request
        if request.kv or request.in_flight:
            out.append(candidate)
            continue
        if not fresh or (places <= 0 and not candidate.begun):
            continue
        memory = memory or Memory(draft, active)
        if memory.admits(request):
            out.append(candidate)
            places -= not candidate.begun
        elif candidate.urgent:
            fresh = False  # what is freed is for this one
    return out
