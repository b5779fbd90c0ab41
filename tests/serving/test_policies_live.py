"""Every policy in the live engine: eight virtual instances under load, the oracle's tokens, and commands that a manager
made by the simulator repeats byte for byte from the recorded events.

The loop, its thread, the event log, manager, policy and executor are the real ones; only the server is left out.
"""

import asyncio
import random
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from loong_jax import codec
from loong_jax.config import LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.eventlog import EventLogWriter, LogHeader, read_event_log
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.sim.config import SimConfig
from loong_jax.sim.driver import Simulation
from loong_jax.sim.workloads import Workload
from loong_jax.types import Arrived, Emit, Finish, FinishReason, ProgramReady, Reject, Sampling, StepDone
from serving.loop import EngineLoop
from serving.outbox import Crashed, SinkItem
from serving.state import EngineState
from tests.support.real_engine import CHAOS_CLUSTERS, FIXTURES, DataPlane
from tests.support.schedules import arcs

CLUSTER = CHAOS_CLUSTERS["eight"]  # its executables are stored already, for the random schedules
LIMITS = LimitsConfig(chunk_tokens=32, max_running=12, decode_headroom_pages=1)
NUM_REQUESTS = 14
LENGTHS = (3, 20, 60, 7, 90, 33)
"""Of prompts, in turn: an instance holds 96 tokens, a step of the largest program takes 16."""


class Stream:
    """The sink of one request, which is greedy or not."""

    def __init__(self, prompt: array, max_tokens: int, sampling: Sampling):
        self.prompt, self.max_tokens, self.sampling = prompt, max_tokens, sampling
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.end: SinkItem | None = None
        self.done = asyncio.Event()

    def put(self, item: SinkItem, now_us: int) -> None:
        if isinstance(item, Emit):
            self.tokens += item.tokens
            self.logprobs += item.logprobs
        elif isinstance(item, Finish | Reject | Crashed):
            self.end = item
            self.done.set()


@pytest.fixture(scope="module")
def plane() -> Iterator[DataPlane]:
    plane = DataPlane(FIXTURES / "gqa", CLUSTER)
    yield plane
    plane.close()


async def serve(plane: DataPlane, policy: str, log: Path) -> list[Stream]:
    """Requests that come while others run."""
    cost, rng = unmeasured(CLUSTER.ladder), random.Random(policy)
    header = LogHeader("test", CLUSTER, LIMITS, policy, dict(cost.coefficients))
    loop = EngineLoop(
        Manager(CLUSTER, LIMITS, POLICIES[policy](CLUSTER, LIMITS), cost),
        EngineState(kv_token_bytes=1, compiles_after_ready=lambda: 0),
        event_log=EventLogWriter(log, header),
    )
    for program, instances in arcs(CLUSTER):
        loop.post(ProgramReady(program, instances))
    loop.start(plane.executor(loop.post), (), asyncio.get_running_loop())
    streams = []
    try:
        for number in range(NUM_REQUESTS):
            length = LENGTHS[number % len(LENGTHS)]
            prompt = array("i", [rng.randrange(3, plane.model.vocab_size) for _ in range(length)])
            sampling = Sampling(temperature=0.8 * (number % 3 == 0), top_k=20, seed=number)
            stream = Stream(prompt, rng.randint(2, 16), sampling)
            loop.arrive(prompt.tobytes(), stream.max_tokens, sampling, (), stream)
            streams.append(stream)
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.02)))
        async with asyncio.timeout(400):  # programs that are not stored yet are compiled on the way
            for stream in streams:
                await stream.done.wait()
    finally:
        await asyncio.to_thread(loop.close)
    return streams


def manager_of_the_simulator(policy: str) -> Manager:
    cost = unmeasured(CLUSTER.ladder)
    config = SimConfig(times=cost, workload=Workload("none", 1.0, ()), cluster=CLUSTER, limits=LIMITS, policy=policy)
    return Simulation(config).manager


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_right_and_the_simulators_manager_gives_the_same_commands(
    plane: DataPlane, policy: str, tmp_path: Path
) -> None:
    log = tmp_path / "events"
    streams = asyncio.run(serve(plane, policy, log))
    num_tokens = num_ties = 0
    for stream in streams:
        assert isinstance(stream.end, Finish), stream.end
        assert stream.end.reason is FinishReason.LENGTH
        assert len(stream.tokens) == stream.max_tokens
        verdict = plane.judge.check(stream.prompt, stream.tokens, stream.logprobs, stream.sampling)
        num_tokens, num_ties = num_tokens + verdict.num_tokens, num_ties + verdict.num_ties
    assert num_ties <= 0.01 * num_tokens
    header, frames = read_event_log(log)
    assert header.policy == policy
    manager = manager_of_the_simulator(policy)
    num_events = {Arrived: 0, StepDone: 0}
    for frame in frames:
        commands = manager.handle(frame.event, frame.now_us)
        assert codec.digest(commands) == frame.commands_digest, frame.event
        manager.check()
        if type(frame.event) in num_events:
            num_events[type(frame.event)] += 1
    assert num_events[Arrived] == NUM_REQUESTS
    assert num_events[StepDone] > NUM_REQUESTS
    assert not manager.state.requests
