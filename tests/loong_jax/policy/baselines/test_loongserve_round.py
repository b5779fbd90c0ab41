"""Batches of a round, and where their KV stays."""

from __future__ import annotations

from loong_jax.cost.unmeasured import unmeasured
from loong_jax.policy.baselines.board import Board, Buckets
from loong_jax.policy.baselines.loongserve_round import Prompts, Round, split, take_prompts
from loong_jax.types import Run, Share
from tests.support.schedules import arcs
from tests.support.views import Seen, draft, instance, prompting

NO_OVERHEAD = unmeasured(prefill_base_s=0.0, prefill_hop_s=0.0, ring_token_s=0.0)


def board(requests: list[Seen], free: tuple[int, ...] = (16, 16, 16, 16), prefilling: tuple[int, ...] = ()) -> Board:
    instances = [instance(i, pages, queued=int(i in prefilling), prefilling=int(i in prefilling))
                 for i, pages in enumerate(free)]  # fmt: skip
    made = draft(requests, instances)
    buckets = Buckets()
    buckets.refresh(frozenset(arcs(made.cluster)))
    return Board(made.cluster, made.limits, buckets, made.view, NO_OVERHEAD)


def batches(requests: list[Seen], mask: int = 0b1111, *, one_batch: bool) -> list[tuple[tuple[int, ...], list[int]]]:
    made = board(requests)
    found = split(made, draft(requests).ready, requests, mask, one_batch=one_batch)
    return [(batch.instances, batch.requests) for batch in found]


def test_the_released_programme_finds_one_batch_and_the_exact_one_sets_the_short_free() -> None:
    """A long prompt and two short ones: alone on an instance, the short ones do not wait for the long one."""
    requests = [prompting(0, 4), prompting(1, 100), prompting(2, 4)]
    assert batches(requests, one_batch=True) == [((0, 1, 2, 3), [1, 0, 2])]
    exact = batches(requests, one_batch=False)
    assert sorted(found for _, found in exact) == [[0, 2], [1]]
    assert sum(len(instances) for instances, _ in exact) == 4


def test_only_what_fits_is_batched() -> None:
    requests = [prompting(0, 60), prompting(1, 60)]
    assert batches(requests, 0b0001, one_batch=True) == [((0,), [0])]


def test_kv_is_kept_on_the_fullest_to_the_last_page() -> None:
    """Ten pages on (0, 1, 2), which have 3, 16 and 5 left: three, then five, then two."""
    request = prompting(7, 40)
    planned = take_prompts(board([request], (3, 16, 5, 16)), Prompts((0, 1, 2), [7], 0.0), {7: request})
    assert planned is not None
    assert planned.keep == (Share(0, 3), Share(2, 5), Share(1, 2))
    assert planned.rows[0].runs == (Run(0, 40),)


def test_a_prompt_beyond_the_largest_program_goes_in_several_steps() -> None:
    """Programs take 16 tokens an instance."""
    request = prompting(7, 40)
    planned = take_prompts(board([request]), Prompts((0, 1), [7], 0.0), {7: request})
    assert planned is not None
    assert planned.rows[0].runs == (Run(0, 32),)


def test_a_round_lasts_until_all_its_prompts_are_through() -> None:
    waiting, through = prompting(1, 40), prompting(2, 40, in_flight=1)
    current = Round([Prompts((0, 1), [1], 0.0), Prompts((2,), [2], 0.0), Prompts((3,), [3], 0.0)], set(), 0)
    made = board([waiting, through], prefilling=(2,))
    assert current.prefilling(made, {1: waiting, 2: through}) == 0b0111
    assert current.open_ids({1: waiting, 2: through}) == {1, 2}
