"""The first policy: whatever the pool can hold is served, and scaling does what it is meant to do."""

from __future__ import annotations

import time

import pytest

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.types import (
    AnyEvent,
    Arrived,
    Finish,
    Free,
    Migrate,
    Phase,
    PrefillRow,
    Prepare,
    ProgramReady,
    Reject,
    RunDecode,
    RunPrefill,
    StepDone,
)
from tests.support.schedules import arcs
from tests.support.served import Served, make_cluster


@pytest.mark.parametrize("num_instances", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("page_tokens", [1, 4])
def test_exactly_the_capacity_is_served(num_instances: int, page_tokens: int) -> None:
    cluster = make_cluster(num_instances, page_tokens)
    capacity = cluster.pool_tokens
    for prompt_len, max_tokens in ((capacity, 1), (capacity - 7, 8), (1, capacity)):
        run = Served(cluster, LimitsConfig(chunk_tokens=8 * page_tokens))
        run.arrive(prompt_len, max_tokens)
        run.finish()
        assert isinstance(run.ends[0], Finish)
    run = Served(cluster)
    run.arrive(capacity, 2)
    assert isinstance(run.ends[0], Reject)


@pytest.mark.parametrize("num_instances", [1, 3, 8])
def test_large_ones_under_load(num_instances: int) -> None:
    """Requests of the whole pool among small ones: evicted and recomputed if need be, but all of them end."""
    cluster = make_cluster(num_instances)
    capacity = cluster.pool_tokens
    run = Served(cluster, LimitsConfig(chunk_tokens=8 * num_instances))
    for _ in range(8):
        run.arrive(5, 14)
    for prompt_len, max_tokens in ((capacity - 9, 10), (capacity // 2, capacity // 2 + 1), (capacity - 20, 20)):
        run.arrive(prompt_len, max_tokens)
        for _ in range(6):
            run.arrive(3, 14)
            run.step()
    run.finish()


def test_memory_pressure_from_decoding() -> None:
    """Six requests that together outgrow the pool while they decode: after many that ended early nobody expects it."""
    run = Served(make_cluster(2), LimitsConfig(chunk_tokens=16, decode_headroom_pages=0))
    for _ in range(6):
        run.arrive(16, 40)
    run.finish()
    assert len(run.of(Free)) == 6  # those who would have to go again never start
    for _ in range(200):
        run.arrive(2, 2)
    run.finish()
    for _ in range(6):
        run.arrive(16, 40)
    run.finish()
    assert len(run.of(Free)) > 212


def test_a_long_prompt_scales_up_and_down_without_migration() -> None:
    """Chunks run on many instances; the last one leaves the KV on the fewest that hold it."""
    free_links = unmeasured(prefill_base_s=0.0, prefill_hop_s=0.0, ring_token_s=0.0, gather_token_s=0.0)
    run = Served(make_cluster(8, pages=32), LimitsConfig(chunk_tokens=32), cost=free_links)
    run.arrive(190, 20)
    run.finish()
    prefills, decodes = run.of(RunPrefill), run.of(RunDecode)
    assert [len(p.instances) for p in prefills] == [8] * 6
    assert not run.of(Migrate)
    assert {len(d.instances) for d in decodes} == {2}  # 190 tokens are 48 pages, an instance holds 32
    assert prefills[-1].moves


def test_one_instance_more_when_memory_is_short() -> None:
    """A request that fills its instance goes on with a second one, and no page moves."""
    run = Served(make_cluster(2), LimitsConfig(decode_headroom_pages=0))
    run.arrive(56, 60)
    run.finish()
    assert [len(d.instances) for d in run.of(RunDecode)] == sorted(len(d.instances) for d in run.of(RunDecode))
    assert {len(d.instances) for d in run.of(RunDecode)} == {1, 2}
    assert run.executor.moved_pages == 0
    assert len(run.of(Free)) == 1


def test_decodes_go_on_beside_a_long_prompt() -> None:
    """Chunk, decode, chunk, decode: the rows on the same instances are not starved, nor is the prompt."""
    run = Served(make_cluster(2, pages=64), LimitsConfig(chunk_tokens=16))
    for _ in range(4):
        run.arrive(4, 60)
    while min(map(len, run.tokens.values())) < 5:
        run.step()
    run.arrive(300, 2)
    start = len(run.commands)
    run.finish()
    rest = run.commands[start:]
    busy = rest[: next(k for k, c in enumerate(rest) if isinstance(c, Finish))]
    kinds = "".join("p" if isinstance(c, RunPrefill) else "d" for c in busy if isinstance(c, RunPrefill | RunDecode))
    assert "ppp" not in kinds
    assert sum(isinstance(c, RunPrefill) for c in rest) >= 10


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    run = Served(make_cluster(2, pages=128), LimitsConfig(chunk_tokens=16))
    run.arrive(700, 2)
    for _ in range(5):
        run.step()
    short = run.arrive(6, 3)
    run.finish()
    ends = [c.request for c in run.of(Finish)]
    assert ends.index(short) == 0


def test_only_ready_groups_and_wanted_ones_are_asked_for() -> None:
    """Ready: DoP 1 and the largest. What would fit better is asked for, once, and used when it comes."""
    cluster = make_cluster(4, pages=8)
    ready = [(program, group) for program, group in arcs(cluster) if program.dop in (1, 4)]
    run = Served(cluster, LimitsConfig(decode_headroom_pages=0), ready)
    run.arrive(40, 80)
    run.finish()
    used = {c.instances for c in run.of(RunPrefill) + run.of(RunDecode)}
    prepares = run.of(Prepare)
    assert prepares
    assert len(prepares) == len(set(prepares))
    assert any(p.program.phase is Phase.DECODE and p.instances in used for p in prepares)


def test_unready_cluster_waits() -> None:
    run = Served(make_cluster(2), ready=[])
    run.arrive(4, 2)
    assert not run.of(RunPrefill)
    for program, instances in arcs(make_cluster(2)):
        run.handle(ProgramReady(program, instances))
    run.finish()


def test_decode_step_is_cheap() -> None:
    """32 rows on a group of eight: some 0.15 ms of CPU on an idle machine; the bound leaves room for a busy one."""
    cluster = ClusterConfig(num_instances=8, pages_per_instance=8192)
    manager = Manager(cluster, LimitsConfig(), Elastic(cluster, LimitsConfig()), unmeasured())
    pending: list[RunPrefill | RunDecode | Migrate] = []

    def handle(event: AnyEvent) -> None:
        pending.extend(c for c in manager.handle(event, 0) if isinstance(c, RunPrefill | RunDecode | Migrate))

    for program, instances in arcs(cluster):
        handle(ProgramReady(program, instances))
    handle(Arrived(0, bytes(4 * 600_000), 10**6 // 4))  # spans instances, so all rows share one group
    for request in range(1, 32):
        handle(Arrived(request, bytes(4 * 1000), 1000))
    times = []
    while len(times) < 100:
        command = pending.pop(0)
        step_rows = () if isinstance(command, Migrate) else command.rows
        rows = [row for row in step_rows if not isinstance(row, PrefillRow) or row.emit]
        event = StepDone(command.step, (1,) * len(rows), (0.0,) * len(rows))
        start = time.thread_time()
        handle(event)
        if len(rows) == 32:
            times.append(time.thread_time() - start)
    assert sorted(times)[50] < 500e-6
