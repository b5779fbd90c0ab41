"""Which waiting requests LoongServe starts."""

from __future__ import annotations

import msgspec

from loong_jax.cost import CostModel
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.policy.baselines.board import Board, Buckets
from loong_jax.policy.baselines.loongserve_dispatch import Constants, Dispatch
from tests.support.views import Seen, decoding, draft, instance, prompting

CONSTANTS = Constants(decode_s=0.01, max_prefill_s=1.0, max_out_of_order=1)
PATIENT = CONSTANTS._replace(max_prefill_s=1e9)


def board(requests=(), free=(16, 16, 16, 16), cost: CostModel | None = None) -> Board:
    made = draft(requests, [instance(i, pages) for i, pages in enumerate(free)])
    return Board(made.cluster, made.limits, Buckets(), made.view, cost or made.cost)


def chosen(waiting, running=(), *, may_pass=False, constants=CONSTANTS, **kwargs) -> list[int]:
    made = board((*running, *waiting), **kwargs)
    return [r.request for r in Dispatch(made, constants, running, 512.0, may_pass).choose(waiting).requests]


def bounded(request: Seen, max_tokens: int) -> Seen:
    return msgspec.structs.replace(request, max_tokens=max_tokens)


def test_in_order_of_arrival_as_far_as_all_fit_to_their_ends() -> None:
    """64 pages of 4. Each is 40 tokens and may get 40 more: 20 pages and a part; the fourth would not fit."""
    waiting = [bounded(prompting(k, 40), 40) for k in range(4)]
    assert chosen(waiting) == [0, 1, 2]


def test_a_request_is_passed_only_while_that_is_allowed() -> None:
    waiting = [bounded(prompting(0, 300), 4), bounded(prompting(1, 8), 4)]  # 75 pages, of 64
    assert chosen(waiting) == []
    assert chosen(waiting, may_pass=True) == [1]


def test_no_more_when_the_prompts_take_too_long() -> None:
    """The first is taken however long it takes."""
    slow = unmeasured(prefill_token_s=0.1)  # on four instances 40 tokens take a second
    waiting = [bounded(prompting(k, 40), 4) for k in range(3)]
    assert chosen(waiting, cost=slow) == [0]
    assert chosen(waiting) == [0, 1, 2]


def test_idle_instances_take_what_loses_no_more_than_decoding_would_last() -> None:
    """One row on instance 0, with 512 - 1 tokens to come at 10 ms: 5.11 s. A prompt of 120 tokens takes 4 s on three
    idle ones and 3 s on all four; or, ten times slower, 40 and 30 s: then it would have to stop the row, which loses
    30 s for its one token, and it gains 5.11 s / 120."""
    row = bounded(decoding(0, {0: 2}), 8)

    def of(token_s: float) -> list[int]:
        cost = unmeasured(prefill_token_s=token_s, prefill_pair_s=0.0)
        return chosen([bounded(prompting(1, 120), 4)], [row], free=(14, 16, 16, 16), cost=cost, constants=PATIENT)

    assert of(0.1) == [1]
    assert of(1.0) == []


def test_from_the_first_undecided_request_on_what_runs_is_forgotten() -> None:
    """A row on 45 of 64 pages that may grow by 39 tokens. Only one instance could be empty, so a prompt of 17 pages is
    undecided. The next is one page now and may become 39: with the row that is too much (7 + 184 + 2 * 39 tokens in
    269 / 4 pages), and the released code does not see the row any more."""
    row = bounded(decoding(0, {0: 15, 1: 15, 2: 15}), 40)
    waiting = [bounded(prompting(1, 66), 1), bounded(prompting(2, 4), 150)]
    kwargs = {"running": [row], "free": (1, 1, 1, 16), "may_pass": True}
    assert chosen(waiting, **kwargs, constants=CONSTANTS._replace(forgets=False)) == [1]
    assert chosen(waiting, **kwargs) == [2, 1]
