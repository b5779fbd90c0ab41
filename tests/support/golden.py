"""Golden scenarios: a script of events, and the decisions that follow, as text beside it.

A file begins with a title and its reason. Lines with ">" are the script: `cluster` and `limits` set fields; `at SECONDS
arrive NAME PROMPT OUTPUT [priority=, ttft_ms=, tpot_ms=, max=]`; `at SECONDS lose INSTANCE`; `at SECONDS crowd NUMBER
PROMPT OUTPUT`; `ready DOPS` restricts what is READY; `from SECONDS` and `show N` bound what is shown. All else is
written by `--rewrite`. Steps take the time that the unmeasured cost model says, on a virtual clock; decode steps
without anything else are only counted.
"""

from __future__ import annotations

import heapq
from array import array
from pathlib import Path
from typing import Any

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy.describe import describe
from loong_jax.policy.elastic import Elastic
from loong_jax.sim.executor import STOP, SimExecutor
from loong_jax.types import (
    AnyEvent,
    Arrived,
    CopyPages,
    Finish,
    InstanceLost,
    Migrate,
    Plan,
    ProgramReady,
    Reject,
    RunDecode,
    RunPrefill,
    Target,
    View,
)
from tests.support.schedules import arcs

STEPS = (RunPrefill, RunDecode, Migrate, CopyPages)


class Shown(Elastic):
    """Writes down each decision."""

    lines: list[str]
    left: int
    from_us = 0
    quiet = 0

    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig) -> None:
        super().__init__(cluster, limits)
        self.wide: set[tuple[int, ...]] = set()

    def plan(self, view: View, cost: CostModel) -> Plan:
        plan = super().plan(view, cost)
        wide = {step.instances for step in plan.decodes if len(step.instances) > 1} - self.wide
        busy = plan.prefills or plan.migrates or plan.evicts or plan.reservations or plan.prepares or wide
        self.wide |= wide
        if busy and self.left and view.now_us >= self.from_us:
            self.flush()
            self.left -= 1
            drawn = describe(view, plan).split("\n")
            self.lines += [f"t={view.now_us / 1000:.1f} ms", *(f"  {line}" for line in drawn)]
        elif plan.decodes:
            self.quiet += len(plan.decodes)
        return plan

    def flush(self) -> None:
        if self.quiet and self.left:
            self.lines.append(f"  ... {self.quiet} decode steps")
        self.quiet = 0


class Scenario:
    def __init__(self, script: list[str]) -> None:
        self.fields: dict[str, dict[str, Any]] = {"cluster": {"instances": 4, "pages": 64}, "limits": {}}
        self.events: list[tuple[int, int, Any]] = []
        self.outputs: dict[int, int] = {}
        self.dops: tuple[int, ...] | None = None
        self.show = 8
        self.from_us = 0
        for line in script:
            self._read(line.split())

    def _read(self, words: list[str]) -> None:
        match words:
            case ["cluster" | "limits" as what, *fields]:
                self.fields[what].update((name, int(value)) for name, _, value in (f.partition("=") for f in fields))
            case ["ready", dops]:
                self.dops = tuple(int(dop) for dop in dops.split(","))
            case ["show", count]:
                self.show = int(count)
            case ["from", seconds]:
                self.from_us = round(float(seconds) * 1e6)
            case ["at", seconds, "crowd", count, prompt, output]:
                for number in range(int(count)):
                    self._push(seconds, self._arrived(1000 + number, int(prompt), int(output), ["max=300"]))
            case ["at", seconds, "lose", instance]:
                self._push(seconds, InstanceLost(int(instance)))
            case ["at", seconds, "arrive", name, prompt, output, *options]:
                self._push(seconds, self._arrived(int(name.removeprefix("r")), int(prompt), int(output), options))
            case _:
                raise ValueError(f"golden: cannot read {' '.join(words)!r}")

    def _push(self, seconds: str, event: AnyEvent) -> None:
        heapq.heappush(self.events, (round(float(seconds) * 1e6), len(self.events), event))

    def _arrived(self, number: int, prompt: int, output: int, options: list[str]) -> Arrived:
        wants = {name: int(value) for name, _, value in (option.partition("=") for option in options)}
        self.outputs[number] = prompt + output - 2
        target = Target(wants.get("priority", 0), wants.get("ttft_ms", 0) * 1000, wants.get("tpot_ms", 0) * 1000)
        tokens = array("i", bytes(4 * prompt)).tobytes()
        return Arrived(number, tokens, wants.get("max", output), stop_ids=(STOP,), target=target)

    def run(self) -> list[str]:
        cluster = self._cluster()
        limits = LimitsConfig(**{"chunk_tokens": 1 << 20, **self.fields["limits"]})
        policy = Shown(cluster, limits)
        policy.lines, policy.left, policy.from_us = [], self.show, self.from_us
        cost = unmeasured()
        manager = Manager(cluster, limits, policy, cost)
        steps: list[tuple[int, int, int]] = []
        executor = SimExecutor(
            cost, cluster.num_instances, manager.state.ledger, lambda at, step: heapq.heappush(steps, (at, 1, step))
        )
        executor.stop_at.update(self.outputs)
        ready = [(p, i) for p, i in arcs(cluster) if self.dops is None or len(i) in self.dops or p.phase == "migrate"]
        for program, instances in ready:
            manager.handle(ProgramReady(program, instances), 0)
        while (self.events or steps) and policy.left:
            event_us = self.events[0][0] if self.events else None
            if steps and (event_us is None or steps[0][0] < event_us):
                now_us, _, step = heapq.heappop(steps)
                event = executor.finish(step, now_us)
            else:
                now_us, _, event = heapq.heappop(self.events)
            if isinstance(event, InstanceLost):
                executor.poison((event.instance,))
            for command in manager.handle(event, now_us):
                if isinstance(command, STEPS):
                    executor.submit(command)
                elif isinstance(command, Finish | Reject) and now_us >= self.from_us:
                    policy.flush()
                    policy.lines.append(_end(command, now_us))
                else:
                    executor.apply(command)
            executor.start_ready(now_us)
            manager.check()
        return policy.lines

    def _cluster(self) -> ClusterConfig:
        given = self.fields["cluster"]
        n = given["instances"]
        rows = (given.get("rows", 32),)
        dops = tuple(range(1, n + 1))
        ladder = LadderConfig(dops=dops, prefill_tokens=(1 << 14,), decode_rows=rows, score_tokens=())
        return ClusterConfig(n, pages_per_instance=given["pages"], ladder=ladder)


def _end(command: Finish | Reject, now_us: int) -> str:
    if isinstance(command, Reject):
        return f"t={now_us / 1000:.1f} ms: r{command.request} is rejected: {command.message}"
    return f"t={now_us / 1000:.1f} ms: r{command.request} ends after {command.num_generated} tokens"


def rewritten(path: Path) -> str:
    """The file as it should be: its own title and script, and the decisions of today."""
    head = [line for line in path.read_text().splitlines() if line.startswith(("#", ">"))]
    script = [line[1:].strip() for line in head if line.startswith(">")]
    return "\n".join([*head, "", *Scenario(script).run()]) + "\n"
