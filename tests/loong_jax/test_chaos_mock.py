"""Random schedules against the mock executor: the manager is right whatever the policy picks (DESIGN 8)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import msgspec
import pytest

from loong_jax import forks, invariants, issue, kv_upkeep
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.core_state import CoreState
from loong_jax.ledger import ForkedPages, Ledger
from loong_jax.manager import Manager, Policy
from loong_jax.policy.elastic import Elastic
from loong_jax.request_state import RequestState
from loong_jax.types import (
    AnyCommand,
    Emit,
    EmitScores,
    Free,
    PageMove,
    PlannedEvict,
    PrefillRow,
    Rehome,
    Reset,
    Run,
    Scores,
    Top,
)
from tests.support import mock_schedules
from tests.support.chaos_policy import ChaosPolicy


def run_schedule(seed: int, *, chaos: bool, all_ready: bool = True, windowed: bool = False) -> None:
    def make(cluster: ClusterConfig, limits: LimitsConfig) -> Policy:
        return ChaosPolicy(cluster, limits, seed) if chaos else Elastic(cluster, limits)

    mock_schedules.run_schedule(seed, make, all_ready=all_ready, windowed=windowed)


@pytest.mark.parametrize("first", range(0, 300, 20))
def test_chaos(first: int) -> None:
    for seed in range(first, first + 20):
        run_schedule(seed, chaos=True)


@pytest.mark.parametrize("chaos", [True, False])
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_pages_outside_every_window_are_dropped(first: int, chaos: bool) -> None:
    for seed in range(first, first + 20):
        run_schedule(40_000_000 + seed, chaos=chaos, all_ready=seed % 3 > 0, windowed=True)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_elastic_under_faults(first: int) -> None:
    for seed in range(first, first + 20):
        run_schedule(10_000_000 + seed, chaos=False)


def _extend_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token joins a page whoever else owns it, and a fork shares the open page."""
    monkeypatch.setattr(Ledger, "fork", _fork_everything)
    monkeypatch.setattr(_Owned, "__eq__", lambda self, other: True)


class _Owned(int):
    """An owner count; the mutation makes every count look like one."""


def _fork_everything(self: Ledger, parent: int, child: int, kv_len: int, copy_on: frozenset[int]) -> ForkedPages:
    shared = []
    for instance in self.table.instances(parent):
        for entry in self.table.pages(parent, instance):
            run = Run(entry.first, min(entry.end, kv_len) - entry.first)
            if run.count > 0:
                shared.append((instance, entry.page, run))
                self._owners[instance][entry.page] = _Owned(self._owners[instance][entry.page] + 1)
                self._entries[instance] += 1
                self._count(child, instance, run.count)
    self.table.share(parent, child, shared)
    return ForkedPages(tuple(shared), None)


def _release_before_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved pages are free before the step's own pages are taken."""

    def moves_first(state: CoreState, rehomes: tuple[Rehome, ...]) -> list[tuple[PageMove, ...]]:
        moves = rehome_moves(state, rehomes)
        for move in chain.from_iterable(moves):
            state.ledger._free[move.src].append(move.src_page)
        return moves

    def move(self: Ledger, moves: tuple[PageMove, ...]) -> None:
        for one in moves:
            if one.src_page in self._free[one.src]:
                self._free[one.src].remove(one.src_page)
        ledger_move(self, moves)

    rehome_moves, ledger_move = issue._rehome_moves, Ledger.move
    monkeypatch.setattr(issue, "_rehome_moves", moves_first)
    monkeypatch.setattr(Ledger, "move", move)


def _reset_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost pool is made anew while steps are still queued on it."""

    def unblock(self: Manager) -> None:
        blocked = tuple(i for i in sorted(self.state.blocked) if self.state.alive[i])
        self.state.blocked.difference_update(blocked)
        self._out.append(Reset(blocked))

    monkeypatch.setattr(Manager, "_unblock", unblock)


def _keep_lost_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manager, "_lose_kv", lambda self, instances: None)


def _forget_the_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manager, "_settle", lambda self, step: None)


def _any_device_has_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device_group` names every instance."""

    def anywhere(self: RequestState) -> tuple[int, ...]:
        if self.issued > self.known:
            self.sampled_on = tuple(range(8))
        return self.sampled_on if self.issued > self.known else ()

    monkeypatch.setattr(RequestState, "device_group", property(anywhere))


def _emit_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def append(self: Manager, request: RequestState, token: int, logprob: float, dop: int, top: Top | None) -> None:
        manager_append(self, request, token, logprob, dop, top)
        if token % 7 == 0:
            self._out.append(Emit(request.id, request.num_generated - 1, (token,), (logprob,), dop))

    manager_append = Manager._append
    monkeypatch.setattr(Manager, "_append", append)


def _leak_on_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(self: Ledger, request: int, instances: Iterable[int]) -> None:
        ledger_free(self, request, list(instances)[:1])

    ledger_free = Ledger.free
    monkeypatch.setattr(Ledger, "free", free)


def _shift_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor is told the tokens of the next position."""

    def tobytes(self: array[int]) -> bytes:
        return array("i", [*self[1:], 0]).tobytes() if len(self) > 3 else self.tobytes()

    def prefill_row(state: CoreState, request: RequestState, *rest: Any) -> PrefillRow:
        row = issue_row(state, request, *rest)
        tokens = array("i")
        tokens.frombytes(row.tokens)
        return msgspec.structs.replace(row, tokens=tobytes(tokens))

    issue_row = issue._prefill_row
    monkeypatch.setattr(issue, "_prefill_row", prefill_row)


def _penalties_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: RequestState, *args: Any, **fields: Any) -> None:
        request_init(self, *args, **fields)
        self.needs_history = False

    request_init = RequestState.__init__
    monkeypatch.setattr(RequestState, "__init__", init)


def _score_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed again is told again."""

    def take_scores(self: RequestState, runs: tuple[Run, ...], scores: Scores) -> EmitScores | None:
        self.num_scored = min(self.num_scored, runs[0].first + 1)
        return request_take_scores(self, runs, scores)

    request_take_scores = RequestState.take_scores
    monkeypatch.setattr(RequestState, "take_scores", take_scores)


def _sample_before_the_scores_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last position of a prompt is decoded while the chunk before it is scored."""

    running = RequestState.running
    eager = property(lambda self: (self.score and not self.holes) or running.__get__(self))

    def check(state: CoreState, request: RequestState, *rest: Any) -> None:
        if not request.score:
            issue_check(state, request, *rest)

    issue_check = issue._check_decode_row
    monkeypatch.setattr(RequestState, "running", eager)
    monkeypatch.setattr(issue, "_check_decode_row", check)


def _children_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of a waiting parent is given a place, and a hole where nothing is missing is not seen."""

    def start_or_hold(state: CoreState, parent: RequestState, child: RequestState) -> list[AnyCommand]:
        return forks._start(state, parent, child)

    monkeypatch.setattr(forks, "start_or_hold", start_or_hold)


MUTATIONS = (
    _extend_shared,
    _release_before_reserve,
    _reset_at_once,
    _keep_lost_kv,
    _forget_the_rollback,
    _any_device_has_the_token,
    _emit_twice,
    _leak_on_abort,
    _shift_a_unit,
    _penalties_one_step_late,
    _score_again,
    _sample_before_the_scores_are_out,
    _children_start_at_once,
)


def _slide_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is dropped although the last position it holds is still seen."""
    monkeypatch.setattr(RequestState, "read_from", lambda self, window: read_from(self, window - 1))
    read_from = RequestState.read_from


def _keep_what_cannot_be_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap is filled again although what it is computed from was dropped."""

    def recount(state: CoreState, request: RequestState) -> tuple[int, ...]:
        request.holes = tuple(state.ledger.table.missing(request.id, request.issued - 1, request.dropped))
        return ()

    monkeypatch.setattr(kv_upkeep, "recount", recount)


def _forget_what_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evicted request is computed from where its KV began."""

    def evict(state: CoreState, planned: PlannedEvict) -> Free:
        dropped = state.requests[planned.request].dropped
        command = issue_evict(state, planned)
        state.requests[planned.request].dropped = dropped
        state.requests[planned.request].holes = tuple(
            run for run in (Run(dropped, state.requests[planned.request].issued - 1 - dropped),) if run.count
        )
        return command

    issue_evict = issue.evict
    monkeypatch.setattr(issue, "evict", evict)


WINDOW_MUTATIONS = (_slide_too_far, _keep_what_cannot_be_completed, _forget_what_was_dropped)


@pytest.mark.parametrize("mutation", WINDOW_MUTATIONS, ids=lambda mutation: mutation.__name__[1:])
def test_a_broken_window_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    # The invariants know it too; here the tokens must tell.
    monkeypatch.setattr(invariants, "check", lambda state: None)
    with pytest.raises((AssertionError, RuntimeError, KeyError, ValueError, IndexError)):
        run_schedules(300, windowed=True)


def run_schedules(count: int, *, windowed: bool = False) -> None:
    for seed in range(count):
        run_schedule(seed, chaos=True, windowed=windowed)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__[1:])
def test_a_broken_core_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedules have the power to see each of these faults."""
    mutation(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, KeyError, ValueError)):
        run_schedules(300)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_elastic_with_few_groups(first: int) -> None:
    for seed in range(first, first + 20):
        run_schedule(20_000_000 + seed, chaos=False, all_ready=False)


@pytest.mark.slow
def test_few_groups_ten_thousand() -> None:
    for seed in range(10_000):
        run_schedule(30_000_000 + seed, chaos=seed % 4 == 0, all_ready=False)


@pytest.mark.slow
def test_windows_ten_thousand() -> None:
    for seed in range(10_000):
        run_schedule(50_000_000 + seed, chaos=seed % 4 > 0, all_ready=seed % 3 > 0, windowed=True)


@pytest.mark.slow
def test_chaos_ten_thousand() -> None:
    for seed in range(1000, 11_000):
        run_schedule(seed, chaos=True)
