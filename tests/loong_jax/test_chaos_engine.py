"""Random schedules on the real data plane: whatever groups, chunks, splits, masters, context forms, migrations,
evictions, aborts, forks and failed steps a schedule holds, tokens are the oracle's, all invariants hold, no page leaks.

The mock's twin, which proves the manager on ten thousand schedules in seconds, is `test_chaos_mock.py`.
"""

import queue
import random
from array import array

import msgspec
import pytest

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.types import Arrived, Emit, Finish, ProgramReady, Sampling
from tests.support.chaos_policy import ChaosPolicy
from tests.support.real_engine import CHAOS_CLUSTERS, FIXTURES, DataPlane, LossyExecutor, Verdict
from tests.support.schedules import Controls, Outcome, Schedule, ScheduleConfig, arcs, replay

CHECKPOINTS = {"four": "gqa", "eight": "gqa", "tp2": "mha", "windowed": "mistral", "sampling": "gqa"}


@pytest.fixture(scope="module")
def plane(request: pytest.FixtureRequest):
    """One at a time: a process cannot map the executables of all of them."""
    plane = DataPlane(FIXTURES / CHECKPOINTS[request.param], CHAOS_CLUSTERS[request.param])
    yield plane
    plane.close()


def run_schedule(plane: DataPlane, seed: int) -> list[Verdict]:
    rng = random.Random(seed)
    cluster = plane.cluster
    limits = LimitsConfig(
        max_running=rng.choice((2, 8)),
        chunk_tokens=rng.choice((8, 16, 64)),
        decode_headroom_pages=rng.choice((0, 1, 2)),
    )
    config = ScheduleConfig(max_prompt=rng.choice((10, 40, 90)), vocab=plane.model.vocab_size)
    if rng.random() > 0.33:  # faults hide what an undisturbed run shows
        config = config._replace(p_fail=0.0, p_lose=0.0)
    if cluster.ladder.score_tokens:
        config = config._replace(p_adjust=0.7, p_top=0.4, p_score=0.4, p_fork=0.1)

    def manager() -> Manager:
        return Manager(cluster, limits, ChaosPolicy(cluster, limits, seed), unmeasured())

    inbox: queue.SimpleQueue = queue.SimpleQueue()
    executor = LossyExecutor(plane, inbox.put)
    try:
        controls = Controls(None, executor.fail, executor.lose, executor.steps_in_flight)
        run = Schedule(manager(), executor, inbox, config, rng, controls).run()
    finally:
        executor.close()
    replay(run, manager())
    return [judge(plane, outcome) for outcome in run.outcomes]


def judge(plane: DataPlane, outcome: Outcome) -> Verdict:
    if outcome.tokens and outcome.num_prompt_top is not None:
        plane.judge.check_scores(outcome.history, outcome.scores, outcome.num_prompt_top)
    return plane.judge.check(
        outcome.history, outcome.tokens, outcome.logprobs, outcome.sampling,
        adjustment=outcome.adjustment, stop_ids=outcome.stop_ids, tops=outcome.tops,
    )  # fmt: skip


def check_schedules(plane: DataPlane, seeds: range) -> None:
    verdicts = [verdict for seed in seeds for verdict in run_schedule(plane, seed)]
    num_tokens = sum(verdict.num_tokens for verdict in verdicts)
    assert sum(verdict.num_ties for verdict in verdicts) <= 0.005 * num_tokens


def batches(sizes: dict[str, range], batch: int) -> list[tuple[str, range]]:
    return [(setting, seeds[i : i + batch]) for setting, seeds in sizes.items() for i in range(0, len(seeds), batch)]


SUITE = {"four": range(120), "eight": range(80), "tp2": range(60), "sampling": range(40)}
SLOW = {setting: range(100_000, 103_400) for setting in CHECKPOINTS}


@pytest.mark.parametrize(("plane", "seeds"), batches(SUITE, 20), indirect=["plane"])
def test_chaos(plane: DataPlane, seeds: range):
    check_schedules(plane, seeds)


@pytest.mark.slow
@pytest.mark.parametrize(("plane", "seeds"), batches(SLOW, 100), indirect=["plane"])
def test_chaos_at_length(plane: DataPlane, seeds: range):
    check_schedules(plane, seeds)


def test_a_context_far_beyond_the_pool():
    """Pages that every window has passed are given back: 400 tokens go through a pool of 128, and none is evicted."""
    ladder = LadderConfig((1,), (32,), (1,), prefill_rows=1, move_pages=1)
    cluster = ClusterConfig(1, pages_per_instance=8, ring_tokens=32, query_tile_tokens=32, slots=2, ladder=ladder)
    plane = DataPlane(FIXTURES / "mistral", msgspec.structs.replace(cluster, kv_window=50))
    assert plane.model.kv_window == 50
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    executor = plane.executor(inbox.put)
    limits = LimitsConfig(chunk_tokens=64)
    manager = Manager(plane.cluster, limits, Elastic(plane.cluster, limits), unmeasured())
    for program, instances in arcs(plane.cluster):
        manager.handle(ProgramReady(program, instances), 0)
    prompt = array("i", [3 + (i * i + i // 7) % (plane.model.vocab_size - 3) for i in range(360)])
    commands = manager.handle(Arrived(0, prompt.tobytes(), 40), 0)
    tokens, logprobs = [], []
    while not any(isinstance(command, Finish) for command in commands):
        for command in commands:
            executor.submit(command)
        commands = manager.handle(inbox.get(timeout=120), 0)
        manager.check()
        assert all(request.num_evictions == 0 for request in manager.state.requests.values())
        for command in commands:
            if isinstance(command, Emit):
                tokens += command.tokens
                logprobs += command.logprobs
    executor.close()
    plane.close()
    assert len(tokens) == 40
    plane.judge.check(prompt, tokens, logprobs, Sampling())
