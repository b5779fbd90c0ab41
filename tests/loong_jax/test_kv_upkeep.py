"""KV that is lost, rolled back, shared or passed by windows, by hand; schedules of all that: `test_chaos_mock.py`."""

import queue
import random
from array import array

import pytest

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.core_state import CoreState
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.forks import start_or_hold
from loong_jax.kv_upkeep import lose, settle, slide
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.request_state import RequestState
from loong_jax.types import (
    AnyEvent,
    Arrived,
    Emit,
    Finish,
    FinishReason,
    Fork,
    Free,
    ProgramReady,
    Run,
    Sampling,
    Slide,
    Truncate,
)
from tests.support.mock_executor import MockExecutor, oracle
from tests.support.schedules import arcs

LADDER = LadderConfig(dops=(1, 2), prefill_tokens=(16,), decode_rows=(4,), prefill_rows=2, move_pages=2)
CLUSTER = ClusterConfig(
    2, page_tokens=4, pages_per_instance=10, ring_tokens=16, query_tile_tokens=16, slots=4, ladder=LADDER, kv_window=6
)


@pytest.fixture
def state() -> CoreState:
    return CoreState(CLUSTER, LimitsConfig())


def decoding(state: CoreState, known: int, request_id: int = 0) -> RequestState:
    """A request with all its KV, pages alternating between both instances."""
    request = RequestState(state.ledger, request_id, 0, array("i", range(known)).tobytes(), 8, Sampling(), ())
    state.enqueue(request)
    state.start(request)
    for first in range(0, known - 1, 4):
        instance = first // 4 % 2
        (page,) = state.ledger.reserve(instance, 1)
        state.ledger.commit(request_id, instance, (page,), Run(first, min(4, known - 1 - first)))
    request.holes = ()
    return request


def test_pages_wholly_before_the_window_are_dropped(state: CoreState) -> None:
    request = decoding(state, 23)
    # The next query is at 22 and sees 17 to 22; page [16, 20) straddles.
    assert slide(state, request) == [Slide(0, 17)]
    assert request.dropped == 16
    assert sorted(state.ledger.tokens(0).items()) == [(0, 4), (1, 2)]
    assert slide(state, request) == [], "nothing more until a page's worth has passed"
    state.ledger.check()
    assert request.missing == (Run(22, 1),)


def test_what_comes_next_in_a_prompt_says_what_is_dropped(state: CoreState) -> None:
    request = decoding(state, 23)
    state.ledger.truncate(0, 12)
    request.holes = (Run(12, 10),)
    assert slide(state, request) == [Slide(0, 7)], "position 12 sees 7 to 12"
    assert request.dropped == 4


def test_without_a_window_everything_is_kept() -> None:
    state = CoreState(ClusterConfig(2, page_tokens=4, pages_per_instance=10, slots=4, ladder=LADDER), LimitsConfig())
    assert slide(state, decoding(state, 23)) == []


def test_a_loss_behind_dropped_kv_sends_the_request_back_to_its_first_token(state: CoreState) -> None:
    whole, slid = decoding(state, 23, 0), decoding(state, 23, 1)
    slide(state, slid)
    assert lose(state, {1}) == [Free(0, (1,)), Free(1, (0, 1))]
    assert whole.holes == (Run(4, 4), Run(12, 4), Run(20, 2)), "all it needs is there or can be computed again"
    assert (slid.holes, slid.dropped) == ((Run(0, 22),), 0)
    assert not state.ledger.tokens(1)


def test_a_rollback_drops_only_the_end(state: CoreState) -> None:
    request = decoding(state, 23)
    slide(state, request)
    step = state.open_step((0,), (), (0,))
    request.issued += 1
    state.ledger.extend(0, 1, 22)
    record = state.close_step(step)
    assert record is not None
    assert settle(state, record) == [Truncate(0, 22)]
    assert (request.holes, request.dropped, request.issued) == ((), 16, 23)


@pytest.mark.parametrize(("known", "shares"), [(25, True), (23, False)])
def test_a_fork_shares_only_what_it_can_complete(state: CoreState, known: int, shares: bool) -> None:
    """Without a program to copy the open page, the child computes it again: from what its window shows, if that is
    still there, else from the first token."""
    parent = decoding(state, known)
    slide(state, parent)
    parent.prompt_len = known - 1  # its first token is known: the child need not wait
    child = RequestState(state.ledger, 1, 0, parent.tokens.tobytes(), 8, Sampling(), ())
    state.enqueue(child)
    out = start_or_hold(state, parent, child)
    if shares:  # the pages end with the KV: none is open
        assert [type(command) for command in out] == [Fork]
        assert (child.dropped, child.holes) == (parent.dropped, ())
    else:
        assert out == []
        assert (child.dropped, child.holes) == (0, (Run(0, known - 1),))
        assert not state.ledger.tokens(1)
    state.ledger.check()


def test_a_context_far_beyond_the_pool() -> None:
    """300 tokens through a pool of 80, nothing evicted; each token is the oracle's."""
    inbox: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
    executor = MockExecutor(CLUSTER, inbox.put, random.Random(0))
    limits = LimitsConfig(chunk_tokens=32)
    manager = Manager(CLUSTER, limits, Elastic(CLUSTER, limits), unmeasured())
    prompt = array("i", [i * i % 97 for i in range(200)])
    for program, instances in arcs(CLUSTER):
        inbox.put(ProgramReady(program, instances))
    inbox.put(Arrived(0, prompt.tobytes(), 100))
    tokens: list[int] = []
    finish = None
    now_us = 0
    while finish is None:
        executor.advance()
        while not inbox.empty():
            now_us += 1
            for command in manager.handle(inbox.get(), now_us):
                executor.submit(command)
                tokens += command.tokens if isinstance(command, Emit) else ()
                finish = command if isinstance(command, Finish) else finish
            manager.check()
            held = sum(CLUSTER.pages_per_instance - manager.state.ledger.free_pages(i) for i in range(2))
            assert held * 4 <= CLUSTER.kv_needed(300) or len(tokens) == 0
            assert all(request.num_evictions == 0 for request in manager.state.requests.values())
    assert finish.reason is FinishReason.LENGTH
    assert tokens == oracle(prompt, Sampling(), 100, window=6)
