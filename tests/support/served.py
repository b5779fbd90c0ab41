"""A manager with a policy and the mock executor, run until every request ended with the oracle's tokens."""

from __future__ import annotations

import queue
import random
from array import array
from collections.abc import Sequence

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import AnyCommand, AnyEvent, Arrived, Emit, Finish, Program, ProgramReady, Reject, Sampling
from tests.support.mock_executor import MockExecutor, oracle
from tests.support.schedules import arcs


def make_cluster(num_instances: int, page_tokens: int = 4, pages: int = 16) -> ClusterConfig:
    dops = tuple(sorted({d for d in (1, 2, 3, 4, 8) if d <= num_instances} | {num_instances}))
    ladder = LadderConfig(dops=dops, prefill_tokens=(4 * page_tokens, 16 * page_tokens), decode_rows=(1, 4))
    return ClusterConfig(
        num_instances=num_instances, page_tokens=page_tokens, pages_per_instance=pages, ring_tokens=16 * page_tokens,
        query_tile_tokens=16 * page_tokens, slots=64, ladder=ladder,
    )  # fmt: skip


class Served:
    """Events and commands go through at once; time is a counter. `commands` are in order."""

    def __init__(
        self,
        cluster: ClusterConfig,
        limits: LimitsConfig = LimitsConfig(),  # noqa: B008 (frozen)
        ready: Sequence[tuple[Program, tuple[int, ...]]] | None = None,
        cost: CostModel | None = None,
        policy: str = "elastic",
    ) -> None:
        self.inbox: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
        self.rng = random.Random(0)
        self.executor = MockExecutor(cluster, self.inbox.put, self.rng)
        self.manager = Manager(cluster, limits, POLICIES[policy](cluster, limits), cost or unmeasured())
        self.commands: list[AnyCommand] = []
        self.prompts: dict[int, tuple[array[int], int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finish | Reject] = {}
        self.now_us = 0
        for program, instances in arcs(cluster) if ready is None else ready:
            self.handle(ProgramReady(program, instances))

    def handle(self, event: AnyEvent) -> None:
        self.now_us += 10
        for command in self.manager.handle(event, self.now_us):
            self.commands.append(command)
            if isinstance(command, Emit):
                self.tokens[command.request] += command.tokens
            elif isinstance(command, Finish | Reject):
                self.ends[command.request] = command
            else:
                self.executor.submit(command)

    def arrive(self, prompt_len: int, max_tokens: int) -> int:
        request = len(self.prompts)
        prompt = array("i", [self.rng.randrange(97) for _ in range(prompt_len)])
        self.prompts[request], self.tokens[request] = (prompt, max_tokens), []
        self.handle(Arrived(request, prompt.tobytes(), max_tokens, Sampling(seed=request)))
        return request

    def step(self) -> None:
        if self.inbox.empty():
            self.executor.advance()
        while not self.inbox.empty():
            self.handle(self.inbox.get())

    def finish(self, max_steps: int = 20_000) -> Served:
        for count in range(max_steps):
            if len(self.ends) == len(self.prompts):
                break
            self.step()
            if count % 16 == 0:
                self.manager.check()
        assert len(self.ends) == len(self.prompts), self.manager.describe()
        self.manager.check()
        for request, (prompt, max_tokens) in self.prompts.items():
            if isinstance(self.ends[request], Finish):
                assert self.tokens[request] == oracle(prompt, Sampling(seed=request), max_tokens), request
        return self

    def of(self, kind: type) -> list:
        return [command for command in self.commands if isinstance(command, kind)]
