"""In which batch, on which group, how much of it, and where the KV stays."""

from __future__ import annotations

import msgspec
import pytest

from loong_jax.buckets import take
from loong_jax.policy import allocate, dispatch
from loong_jax.policy.prefill import PrefillPlanner
from loong_jax.policy.scale import DecodePlanner
from loong_jax.policy.times import Times
from loong_jax.types import ContextForm, Phase, Program, Run
from tests.support.views import FOUR, LIMITS, decoding, draft, instance, prompting


def batches(*requests, instances=FOUR, price: float = 0.0, **kwargs):
    """(prefills, reservations), and the draft behind them."""
    made = draft(requests, instances, **kwargs)
    times = Times(made.cluster, made.cost)
    decode = DecodePlanner(made, [request for request in requests if request.running])
    waiting = [request for request in requests if not request.running and request.in_flight == 0]
    candidates = dispatch.under_way(waiting, 0, times.alone_s, made.limits)
    allowed = allocate.allowance(made, decode.groups, times)
    planner = PrefillPlanner(made, times, allowed, price)
    planner.plan(dispatch.admitted(made, made.view.active, dispatch.in_order(candidates), 0))
    return planner.prefills, planner.reservations, made


@pytest.mark.parametrize(
    ("missing", "num_units", "taken"),
    [
        ((Run(0, 10),), 9, (Run(0, 10),)),
        ((Run(0, 10),), 2, (Run(0, 8),)),
        ((Run(6, 10),), 1, (Run(6, 2),)),  # the cut falls on a page boundary
        ((Run(6, 3), Run(20, 3)), 2, (Run(6, 3), Run(20, 3))),
        ((Run(6, 3), Run(20, 30)), 3, (Run(6, 3), Run(20, 8))),
        ((Run(6, 3),), 0, ()),
    ],
)
def test_the_first_runs(missing, num_units, taken) -> None:
    assert take(missing, num_units, 4) == taken


def test_a_long_prompt_takes_a_chunk_and_short_ones_go_first() -> None:
    two = [instance(0), instance(1)]
    (prefill,), _, _ = batches(prompting(0, 60), instances=two)
    assert [row.runs for row in prefill.rows] == [(Run(0, LIMITS.chunk_tokens),)]
    prefills, _, _ = batches(prompting(0, 60), prompting(1, 4), prompting(2, 8), instances=two)
    assert 0 not in _rows(prefills[0])


def test_an_end_is_packed_and_what_lies_elsewhere_moves_there() -> None:
    (prefill,), _, _ = batches(prompting(0, 24, {0: 2, 1: 2}))
    assert len({share.instance for share in prefill.keep}) == 1
    (rehome,) = prefill.rehome
    assert (rehome.request, rehome.pages) == (0, 2)
    assert rehome.dst == prefill.keep[0].instance
    assert prefill.form is ContextForm.RING  # gathered queries would leave the context where it is


def test_rows_gather_where_instances_are_wanted_and_spread_where_they_are_not() -> None:
    row = decoding(0, {0: 4}, in_flight=1)
    prompt = prompting(1, 48, {0: 4, 1: 4})
    (prefill,), _, _ = batches(row, prompt)
    assert {share.instance for share in prefill.keep} == {1}
    (prefill,), _, _ = batches(row, prompt, price=1.0)
    assert {share.instance for share in prefill.keep} == {0}


def test_a_chunk_in_the_middle_is_kept_evenly() -> None:
    (prefill,), _, made = batches(prompting(0, 200, {0: 2, 1: 2}), instances=[instance(0), instance(1)])
    assert [share.pages for share in prefill.keep] == [4, 4]
    assert not prefill.rehome
    assert made.free == {0: 12, 1: 12}


def test_one_that_does_not_fit_beside_the_others_waits_and_a_lighter_one_passes() -> None:
    holder = prompting(0, 200, {0: 8}, in_flight=1)  # 50 pages in all
    prefills, _, _ = batches(holder, prompting(1, 100))
    assert prefills == []
    light = msgspec.structs.replace(prompting(2, 4), max_tokens=4)
    (prefill,), _, _ = batches(msgspec.structs.replace(holder, max_tokens=4), prompting(1, 100), light)
    assert [row.request for row in prefill.rows] == [2]


def test_a_group_that_is_busy_is_held() -> None:
    busy = [instance(0, queued=1, prefilling=1), instance(1), instance(2, alive=False), instance(3, alive=False)]
    prefills, (held,), made = batches(prompting(0, 40, {0: 2}), instances=busy)
    assert prefills == []
    assert (held.request, 0 in held.instances, held.until_us) == (0, True, LIMITS.hold_us)
    assert made.held
    prefills, (held,), _ = batches(prompting(0, 40, {0: 2, 1: 2}), prompting(1, 100), instances=busy)
    assert (prefills, held.instances) == ([], (0, 1))  # nobody else takes what is held


def test_no_second_prefill_before_the_first_is_done() -> None:
    assert batches(prompting(1, 8), instances=[instance(0, queued=1, prefilling=1)])[0] == []
    (prefill,), _, _ = batches(prompting(1, 8), instances=[instance(0, queued=1)])
    assert prefill.instances == (0,)


def test_a_holder_without_a_free_page_in_reach_is_blocked() -> None:
    prompt = prompting(0, 80, {0: 8, 1: 8})
    prefills, _, made = batches(prompt, instances=[instance(0, free=0), instance(1, free=0)])
    assert prefills == []
    assert made.blocked is prompt


def test_a_holder_that_no_group_can_span_is_stuck() -> None:
    prompt = prompting(0, 80, {0: 2, 1: 2, 2: 2})
    assert batches(prompt)[2].stuck == []
    prefills, _, made = batches(prompt, dops=(1, 2))
    assert prefills == []
    assert made.stuck == [prompt]


def test_a_program_is_asked_for_when_none_is_ready() -> None:
    prefills, _, made = batches(prompting(0, 8), ready=[])
    assert prefills == []
    assert [(p.program.dop, p.instances) for p in made.prepares] == [(1, (0,))]


def test_scored_prompts_have_batches_of_their_own() -> None:
    prompts = prompting(0, 8, score=True), prompting(1, 8), prompting(2, 8, score=True), prompting(3, 8)
    prefills, _, _ = batches(*prompts)
    assert {True, False} == {p.score for p in prefills}
    for prefill in prefills:
        assert {prompts[request].score for request in _rows(prefill)} == {prefill.score}


def _rows(prefill) -> set[int]:
    return {row.request for row in prefill.rows}


def test_scoring_programs_are_asked_for_when_they_are_wanted() -> None:
    """First on one instance; when that is full, on as many as the prompt needs, and nothing is evicted meanwhile."""
    alone = (Program(Phase.SCORE, 1, 16), (0,))
    _, _, made = batches(prompting(0, 100, score=True), ready=[])
    assert [p.program for p in made.prepares] == [alone[0]]
    full = prompting(0, 100, {0: 16}, score=True)  # 25 pages; an instance has 16
    instances = [instance(0, free=0), instance(1), instance(2), instance(3)]
    prefills, _, made = batches(full, instances=instances, ready=[alone])
    assert (prefills, made.blocked) == ([], None)
    assert [(p.program, p.instances) for p in made.prepares] == [(Program(Phase.SCORE, 2, 16), (0, 1))]
    pair = (Program(Phase.SCORE, 2, 16), (0, 1))
    (prefill,), _, _ = batches(full, instances=instances, ready=[alone, pair])
    assert prefill.instances == (0, 1)
