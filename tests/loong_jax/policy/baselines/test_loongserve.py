"""LoongServe as published: rounds, lock-step, packing, preemption."""

from __future__ import annotations

from loong_jax.config import LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.types import Finish, Free, Migrate, RunDecode, RunPrefill
from tests.support.served import Served, make_cluster

LIMITS = LimitsConfig(decode_headroom_pages=0)
NO_OVERHEAD = unmeasured(prefill_base_s=0.0, prefill_hop_s=0.0, ring_token_s=0.0)


def served(num_instances: int = 4, pages: int = 64, cost: CostModel = NO_OVERHEAD, policy: str = "loongserve_2024"):
    return Served(make_cluster(num_instances, pages=pages), LIMITS, cost=cost, policy=policy)


def test_prefill_on_many_then_decode_on_the_fewest() -> None:
    run = served(pages=16)
    run.arrive(100, 8)
    run.finish()
    (prefill,) = run.of(RunPrefill)
    assert len(prefill.instances) == 4
    assert [row.homes for row in prefill.rows] == [(0,) * 16 + (1,) * 9]  # 25 pages; full, without headroom
    assert {decode.instances for decode in run.of(RunDecode)} == {(0, 1)}
    assert not run.of(Migrate)


def test_a_waiting_request_starts_after_ten_iterations_of_decoding() -> None:
    """On one instance: the queue is looked at when nothing decodes, and then every ten iterations."""
    run = served(1)
    run.arrive(8, 40)
    run.step()
    run.arrive(8, 2)
    run.finish()
    kinds = "".join({RunPrefill: "p", RunDecode: "d"}.get(type(c), "") for c in run.commands)
    assert kinds == "p" + "d" * 10 + "p" + "d" * 29


def two_batches() -> Served:
    """By the exact programme, one request on each of two instances, both decoding."""
    run = served(2, pages=16, cost=unmeasured(), policy="loongserve")
    # They come together, behind a first one that keeps the round closed until both wait.
    run.arrive(4, 1)
    for _ in range(2):
        run.arrive(16, 16)
    while not (run.tokens[1] and run.tokens[2]):
        run.step()
    assert [c.instances for c in run.of(RunPrefill)][1:] == [(1,), (0,)]
    return run


def test_all_batches_decode_in_lock_step() -> None:
    """No batch is given its next step before the other has done its own."""
    run = two_batches()
    while len(run.tokens[1]) < 4:
        run.step()
    seen = len(run.commands)
    while len(run.tokens[1]) < 12:
        run.step()
        new = [c for c in run.commands[seen:] if isinstance(c, RunDecode)]
        assert [c.instances for c in new] in ([], [(0,), (1,)], [(1,), (0,)])
        seen = len(run.commands)


def test_decodes_are_packed_to_make_an_instance_free() -> None:
    """Both hold a few pages; a prompt of fourteen fits an instance, if one is emptied."""
    run = two_batches()
    run.arrive(56, 2)
    run.finish()
    steps = [c for c in run.commands if isinstance(c, Migrate | RunPrefill)]
    assert isinstance(steps[-2], Migrate)
    assert isinstance(steps[-1], RunPrefill)
    assert steps[-1].instances == (steps[-2].moves[0].src,)


def test_a_decode_batch_stops_for_a_prompt_that_needs_its_instance() -> None:
    """A hundred tokens need both instances; the row on the first waits until they are through."""
    run = served(2, pages=16, cost=unmeasured())
    run.arrive(8, 40)
    run.step()
    run.arrive(100, 2)
    while len([c for c in run.of(RunPrefill) if len(c.instances) == 2]) == 0:
        run.step()
    assert isinstance(run.commands[-1], RunPrefill)  # nothing beside it
    assert [step.is_prefill for step in run.manager.state.steps.values()] == [True]
    run.finish()


def test_the_newest_goes_when_decoding_finds_no_page() -> None:
    run = served(1, pages=16)
    for _ in range(3):
        run.arrive(16, 40)
    run.finish()
    evicted = [free.request for free in run.of(Free)]
    assert evicted.count(0) == 1
    assert all(isinstance(end, Finish) for end in run.ends.values())
