"""Deterministic simulation testing: from one number to a small cluster, a workload, a policy and its faults; the run,
and what must hold of it.

What it is: the simulator with the mock executor inside, so that contents are checked as well as state: each step reads
the pages that it would read on a device. What it is not: a search for the seed that fails (the tests do that).
"""

from __future__ import annotations

import random
from array import array

import msgspec

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.policy import POLICIES
from loong_jax.sim import Outcome, Result, SimConfig, Workload, run
from loong_jax.sim.clock import NEVER_US
from loong_jax.sim.driver import Simulation
from loong_jax.sim.executor import STOP, InFlight, SimExecutor
from loong_jax.sim.faults import Faults
from loong_jax.sim.workloads import Request
from loong_jax.types import AnyCommand, Emit, EmitScores, Sampling, StepCommand, StepDone, StepFailed
from tests.support.chaos_policy import ChaosPolicy
from tests.support.mock_executor import VOCAB, MockExecutor, oracle
from tests.support.simulated import RoundTimes, small_cluster, small_config

KINDS = (
    "slow", "failed", "late", "lost completion", "twice", "abort", "stop", "lost instance", "clock jump", "not ready",
    "storm",
)  # fmt: skip

ALLOWED = {
    "finished": (),
    "aborted": ("abort",),
    "failed": ("failed", "lost completion", "lost instance"),
    "rejected": ("storm", "lost instance"),
}
"""How a request may end, and of which faults one must have happened."""


class ContentExecutor(SimExecutor):
    """Every command goes to a mock executor too, and it says what a step samples."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mock: MockExecutor | None = None

    def submit(self, command: StepCommand) -> None:
        super().submit(command)
        self._mock.submit(command)

    def apply(self, command: AnyCommand) -> None:
        super().apply(command)
        if not isinstance(command, EmitScores):
            self._mock.submit(command)

    def poison(self, instances) -> None:
        instances = list(instances)
        super().poison(instances)
        for instance in instances:
            self._mock.lose(instance)

    def answer(self, step: int, done: InFlight) -> StepDone | StepFailed:
        meant = super().answer(step, done)
        if isinstance(meant, StepFailed):
            self._mock.fail(step)
        event = self._mock.run(step)
        assert type(event) is type(meant), (event, meant)
        return event  # type: ignore[return-value]

    @property
    def _mock(self) -> MockExecutor:
        assert self.mock is not None
        return self.mock


class ContentSimulation(Simulation):
    """Keeps the streams, and compares each with what its prompt must give."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config, ContentExecutor)
        assert isinstance(self.executor, ContentExecutor)
        self.executor.mock = MockExecutor(config.cluster, lambda event: None, random.Random(0))
        self.streams: dict[int, list[int]] = {}

    def step(self, *args) -> bool:
        state = self.manager.state
        assert len(state.waiting) <= state.limits.max_waiting, "more wait than may"
        return super().step(*args)

    def emit(self, command: Emit) -> None:
        super().emit(command)
        self.streams.setdefault(command.request, []).extend(command.tokens)

    def ended(self, outcome: Outcome) -> None:
        stream = self.streams.get(outcome.request, [])
        prompt = array("i")
        prompt.frombytes(_prompt(self.config.workload.name, outcome.request, outcome.prompt_len))
        window = self.config.cluster.kv_window
        wanted = oracle(prompt, Sampling(), outcome.output_len, window=window)
        if STOP in wanted:
            wanted = wanted[: wanted.index(STOP) + 1]
        assert stream == wanted[: len(stream)], f"INV-11: {outcome}"
        assert outcome.status != "finished" or len(stream) == len(wanted), f"INV-11: {outcome}"


def simulate(seed: int, policies: tuple[str, ...] = ()) -> Result:
    """The run of a seed, with all that must hold of it checked. Raises AssertionError, or whatever finds a mistake."""
    config = config_of(seed, policies)
    simulation = ContentSimulation(config)
    result = simulation.run()
    state = simulation.manager.state
    assert not state.requests, simulation.manager.describe()
    assert len(result.outcomes) == len(config.workload.requests)
    happened = {*result.faults, *(("storm",) if config.limits.max_waiting < len(result.outcomes) else ())}
    for outcome in result.outcomes:
        assert outcome.status in ALLOWED, outcome
        assert not ALLOWED[outcome.status] or happened & set(ALLOWED[outcome.status]), (outcome, happened)
    _check_nothing_is_left(simulation)
    return result


def replayed_hash(seed: int) -> str:
    """The event log of the seed once more. What holds of the same events need not be checked again."""
    return ContentSimulation(msgspec.structs.replace(config_of(seed), check_every=0)).run().event_log_hash


def _check_nothing_is_left(simulation: Simulation) -> None:
    """Steps in flight at the end come back, and then everything is free again."""
    while len(simulation.timeline) and simulation.manager.state.steps:
        simulation.step()
    simulation.manager.check()
    state = simulation.manager.state
    pages = state.cluster.pages_per_instance
    assert all(state.ledger.free_pages(i) == pages for i in range(len(state.queued))), "a page leaked"
    assert len(state.free_slots) == state.cluster.slots, "a slot leaked"
    assert state.num_admitted == state.num_finished == len(simulation.outcomes), "INV-1"


def check_crowd(policy: str, num_short: int = 600) -> None:
    """A prompt that needs most of all pools comes into a steady stream of short ones, which alone are more than the
    machine can do. Of those that come after it, most have their first token after it."""
    cluster = small_cluster(2, pages=40)
    long_at, gap_us = num_short // 4, 1100
    listed = [(gap_us * i, 24, 3) for i in range(num_short)]
    listed.insert(long_at, (gap_us * long_at, 480, 3))
    limits = LimitsConfig(max_running=8, chunk_tokens=64, hold_us=50_000, patience_us=40_000)
    result = run(small_config(listed, cluster=cluster, policy=policy, limits=limits, tick_us=10_000))
    assert result.summary.finished == len(listed), result.summary
    long = result.outcomes[long_at]
    later = result.outcomes[long_at + 1 :]
    passed = [o.request for o in later if o.first_us < long.first_us]
    assert len(passed) <= len(later) // 2, f"{policy}: {len(passed)} short requests passed the long one"


def config_of(seed: int, policies: tuple[str, ...] = ()) -> SimConfig:
    """A third of the seeds have no faults, the others some of all kinds. `policies`: names to choose from; by default
    all there are, and one that picks at random."""
    rng = random.Random(f"dst {seed}")
    n = rng.choice((1, 2, 2, 3, 4))
    cluster = ClusterConfig(
        num_instances=n,
        page_tokens=rng.choice((1, 4, 8)),
        pages_per_instance=rng.choice((16, 24, 40)),
        ring_tokens=64,
        query_tile_tokens=64,
        slots=rng.choice((6, 16)),
        kv_window=rng.choice((0, 0, 0, 5, 12)),
        ladder=LadderConfig(
            dops=tuple(range(1, n + 1)), prefill_tokens=rng.choice(((8, 32), (16,), (64,))),
            decode_rows=rng.choice(((2, 8), (4,))), prefill_rows=rng.choice((2, 8)), move_pages=rng.choice((2, 8)),
            score_tokens=(),
        ),
    )  # fmt: skip
    limits = LimitsConfig(
        max_waiting=rng.choice((5, 64)),
        max_running=rng.choice((4, 6)),
        chunk_tokens=rng.choice((16, 64)),
        decode_headroom_pages=rng.choice((0, 1, 2)),
        hold_us=rng.choice((20_000, 2_000_000)),
        max_step_failures=rng.choice((3, 8)),
    )
    names = policies or (*(name for name in POLICIES if n > 1 or "disaggregated" not in name), "chaos")
    name = names[rng.randrange(len(names))]
    policy = (lambda c, lim: ChaosPolicy(c, lim, seed)) if name == "chaos" else name
    requests, workload = _requests(rng, cluster), f"seed {seed}"
    return SimConfig(
        times=RoundTimes(),
        workload=Workload(workload, 1.0, requests),
        cluster=cluster,
        limits=limits,
        policy=policy,
        fused=rng.random() < 0.2,
        subsets=rng.random() < 0.3,
        tick_us=10_000,
        prepare_us=rng.choice((0, 3000, 50_000)),
        drain_s=20.0,
        faults=_faults(rng, seed) if rng.random() < 0.7 else None,
        hash_commands=True,
        prompt=lambda request, length: _prompt(workload, request, length),
        check_every=1,
    )


def _requests(rng: random.Random, cluster: ClusterConfig) -> tuple[Request, ...]:
    """Short and long ones, up to what all pools together hold."""
    most = max(2, cluster.pool_tokens - 4 * cluster.page_tokens * cluster.num_instances)
    at_us, out = 0, []
    for _ in range(rng.randint(4, 16)):
        at_us += rng.choice((0, 500, 3000, 20_000))
        length = rng.choice((1, 3, rng.randint(1, 20), rng.randint(1, most), rng.randint(max(1, most // 2), most)))
        output = min(rng.choice((1, 2, rng.randint(1, 12), rng.randint(1, 40))), most - 1)
        out.append(Request(at_us, max(1, min(length, most - output)), output, output))
    return tuple(out)


def _faults(rng: random.Random, seed: int) -> Faults:
    """Some kinds are off, so that others are seen alone as well."""
    some = lambda *values: rng.choice((0.0, *values))
    return Faults(
        seed=seed,
        p_slow=some(0.1, 0.3),
        p_fail=some(0.01, 0.05),
        p_late=some(0.1, 0.5),
        p_lost=some(0.01, 0.03),
        p_twice=some(0.1, 0.3),
        p_abort=some(0.01, 0.05),
        p_stop=some(0.01, 0.03),
        p_lose=some(0.003, 0.01),
        p_jump=some(0.01),
        p_unready=some(0.5, 1.0),
        p_storm=some(0.5, 1.0),
        slow_factor=20.0,
        late_us=rng.choice((500, 5000)),
        watchdog_us=30_000,
        rejoin_us=rng.choice((3000, 100_000, NEVER_US)),
        jump_us=10_000_000,
        ready_us=50_000,
    )


def _prompt(workload: str, request: int, length: int) -> bytes:
    rng = random.Random(f"{workload} {request}")
    return array("i", [rng.randrange(VOCAB) for _ in range(length)]).tobytes()
