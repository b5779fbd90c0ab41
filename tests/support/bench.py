"""A manager whose plans a test gives by hand, one event at a time."""

from __future__ import annotations

from array import array

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.invariants import check_state
from loong_jax.manager import Manager
from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    Arrived,
    ContextForm,
    CopyPages,
    Migrate,
    Plan,
    PlannedDecode,
    PlannedDecodeRow,
    PlannedPrefill,
    PlannedPrefillRow,
    ProgramReady,
    RequestView,
    Run,
    RunDecode,
    RunPrefill,
    Share,
    StepDone,
    Tick,
    View,
)
from tests.support.schedules import arcs

LADDER = LadderConfig(dops=(1, 2, 4), prefill_tokens=(16, 64), decode_rows=(1, 4), prefill_rows=2, move_pages=2)
CLUSTER = ClusterConfig(
    num_instances=4, page_tokens=4, pages_per_instance=8, ring_tokens=16, query_tile_tokens=16, slots=4, ladder=LADDER
)
RING = ContextForm.RING
FIRST = Run(0, 4)
ONE_PAGE = Share(0, 1)


class Scripted:
    """Gives one plan, once."""

    def __init__(self) -> None:
        self.next = Plan()
        self.seen: View | None = None

    def plan(self, view: View, cost: CostModel) -> Plan:
        plan, self.next, self.seen = self.next, Plan(), view
        return plan


class Bench:
    """A manager, its scripted policy, and every command so far."""

    def __init__(self, cluster: ClusterConfig = CLUSTER, limits: LimitsConfig = LimitsConfig()) -> None:  # noqa: B008
        self.policy = Scripted()
        self.manager = Manager(cluster, limits, self.policy, unmeasured())
        self.now_us = 0
        for program, instances in arcs(cluster):
            self.handle(ProgramReady(program, instances))

    def handle(self, event: AnyEvent, **plan: object) -> list[AnyCommand]:
        self.policy.next = Plan(**plan)  # type: ignore[arg-type]
        self.now_us += 1
        return self.manager.handle(event, self.now_us)

    def arrive(self, request: int, prompt_len: int, max_tokens: int = 8, **fields: object) -> list[AnyCommand]:
        prompt = array("i", range(100, 100 + prompt_len)).tobytes()
        return self.handle(Arrived(request, prompt, max_tokens, **fields))  # type: ignore[arg-type]

    def prefill(
        self, request: int, instances: tuple[int, ...], runs: list[Run], keep: list[Share], **fields: object
    ) -> RunPrefill:
        row = PlannedPrefillRow(request, tuple(runs))
        planned = PlannedPrefill(instances, RING, (row,), tuple(keep), **fields)  # type: ignore[arg-type]
        (command,) = self.handle(Tick(), prefills=(planned,))
        assert isinstance(command, RunPrefill)
        return command

    def decode(self, instances: tuple[int, ...], *rows: tuple[int, int]) -> RunDecode:
        planned = PlannedDecode(instances, tuple(PlannedDecodeRow(request, master) for request, master in rows))
        (command,) = self.handle(Tick(), decodes=(planned,))
        assert isinstance(command, RunDecode)
        return command

    def done(self, command: RunPrefill | RunDecode | Migrate | CopyPages, *tokens: int) -> list[AnyCommand]:
        return self.handle(StepDone(command.step, tokens, tuple(-0.5 for _ in tokens)))

    def running(self, request: int, prompt_len: int, instance: int = 0, max_tokens: int = 8, **fields: object) -> None:
        """A request that has sampled its first token, 7."""
        self.arrive(request, prompt_len, max_tokens, **fields)
        share = Share(instance, -(-prompt_len // 4))
        self.done(self.prefill(request, (instance,), [Run(0, prompt_len)], [share]), 7)

    def view(self, request: int) -> RequestView:
        return next(r for r in self.manager.view().requests if r.request == request)

    def check(self) -> None:
        """Not INV-8: a script leaves requests idle on purpose."""
        check_state(self.manager.state)

    def free_pages(self) -> list[int]:
        return [i.free_pages for i in self.manager.view().instances]
