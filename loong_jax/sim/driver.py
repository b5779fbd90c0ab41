"""The discrete-event loop: arrivals and completions, in the order of a virtual clock, through an unchanged manager.

It does what the live loop does (`serving/loop.py`): one event at a time, its commands in order to the executor, a Tick
when nothing happened for `tick_us` while requests are open. Deciding takes no virtual time.
What it is not: the truth about durations (`executor.py`) or about what breaks (`faults.py`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import msgspec

from loong_jax import codec
from loong_jax.config import ConfigError
from loong_jax.device_sets import device_sets, on_sets
from loong_jax.ledger import InvariantError
from loong_jax.manager import Manager, Policy
from loong_jax.policy import POLICIES
from loong_jax.sim.clock import NEVER_US, Timeline
from loong_jax.sim.config import Outcome, Result, SimConfig
from loong_jax.sim.executor import STOP, SimExecutor
from loong_jax.sim.faults import FaultPlan, Ready
from loong_jax.sim.metrics import summarise
from loong_jax.types import (
    NO_TARGET,
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    CopyPages,
    Emit,
    Finish,
    FinishReason,
    InstanceJoined,
    InstanceLost,
    Migrate,
    Phase,
    Prepare,
    ProgramReady,
    Reject,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
    Stopped,
    Target,
    Tick,
)

_STEPS = (RunDecode, RunPrefill, Migrate, CopyPages)
_STATUS = {
    FinishReason.STOP: "finished",
    FinishReason.LENGTH: "finished",
    FinishReason.ABORT: "aborted",
    FinishReason.ERROR: "failed",
}
PROGRESS_EVENTS = 1024


class SimStuck(RuntimeError):
    """Requests are open, and nothing will ever happen again: a bug of the policy or the manager."""


def run(config: SimConfig) -> Result:
    """One simulation from start to end. The same config gives the same Result, but for `cpu_s`.

    Raises ConfigError for a policy that does not exist, PlanError and InvariantError when policy or manager break a
    rule, SimStuck when they wait for nothing."""
    return Simulation(config).run()


def make_policy(config: SimConfig) -> Policy:
    if not isinstance(config.policy, str):
        return config.policy(config.cluster, config.limits)
    if config.policy not in POLICIES:
        raise ConfigError(f"policy: {config.policy!r} is none of {', '.join(POLICIES)}")
    return POLICIES[config.policy](config.cluster, config.limits)


class Simulation:
    """`make_executor` makes the simulated machine: tests give one that keeps contents too."""

    def __init__(self, config: SimConfig, make_executor: type[SimExecutor] = SimExecutor) -> None:
        self.config = config
        self.now_us = 0
        self.timeline: Timeline[int | AnyEvent | Callable[[], None]] = Timeline()  # a number: that step is done
        cost = config.cost if config.cost is not None else config.times
        self.manager = Manager(config.cluster, config.limits, make_policy(config), cost)  # type: ignore[arg-type]
        self.faults = FaultPlan(config.faults) if config.faults is not None else None
        self.executor = make_executor(
            config.times,
            config.cluster.num_instances,
            self.manager.state.ledger,
            self.timeline.push,
            fused=config.fused,
            faults=self.faults,
            record=config.record,
        )
        self.outcomes: list[Outcome] = []
        self._requests = config.workload.requests
        if self.faults is not None:
            self._requests = self.faults.storm(self._requests)
        self._arrived = 0
        self._skew_us = 0  # the manager's clock is that much ahead of the simulation's
        self._lost: set[int] = set()
        self._open: dict[int, Outcome] = {}
        self._hash = hashlib.blake2b(digest_size=16)
        self._encode = msgspec.msgpack.Encoder(order="deterministic").encode
        self._num_events = 0

    def run(self) -> Result:
        start_s = time.process_time()
        self._make_ready()
        requests = self._requests
        end_us = (requests[-1].arrived_us if requests else 0) + round(self.config.drain_s * 1e6)
        while self._open or self._arrived < len(requests):
            if not self.step(end_us):
                break
        if self.config.progress is not None:
            self.config.progress(len(requests), len(requests))
        return Result(
            outcomes=self.outcomes,
            summary=summarise(self.outcomes, self.config.slo),
            spans=self.executor.spans,
            event_log_hash=self._hash.hexdigest(),
            num_events=self._num_events,
            num_steps=self.executor.num_steps,
            faults=dict(self.faults.counts) if self.faults is not None else {},
            sim_s=self.now_us * 1e-6,
            cpu_s=time.process_time() - start_s,
        )

    def _make_ready(self) -> None:
        programs = self.programs()
        if self.faults is not None:
            programs, later = self.faults.ready(programs)
            for at_us, (program, instances) in later:
                self.timeline.push(at_us, ProgramReady(program, instances))
        for program, instances in programs:
            self._take(ProgramReady(program, instances))

    def programs(self) -> list[Ready]:
        """READY unless something delays it: the ladder without scoring, on the sets of the live engine or on all."""
        config = self.config
        n, ladder = config.cluster.num_instances, config.cluster.ladder
        if config.subsets:
            sets = [tuple(i for i in range(n) if mask >> i & 1) for mask in range(1, 1 << n)]
        else:
            sets = device_sets(n, ladder.dops, "cpu")
        programs = [program for program in ladder.programs() if program.phase is not Phase.SCORE]
        return on_sets(programs, sets)

    def step(self, end_us: int = NEVER_US) -> bool:
        """Let the next thing happen; False when the end of the run comes before it."""
        requests, timeline = self._requests, self.timeline
        arrival_us = requests[self._arrived].arrived_us if self._arrived < len(requests) else NEVER_US
        next_us = timeline.next_us
        at_us = min(arrival_us, next_us)
        if self._open and at_us > self.now_us + self.config.tick_us:
            if at_us == NEVER_US and not self._may_go_on():
                raise SimStuck(self.manager.describe())
            at_us = self.now_us + self.config.tick_us
        if at_us > end_us:
            return False
        self.now_us = max(self.now_us, at_us)
        if at_us == arrival_us:
            self._arrive()
        elif at_us == next_us:
            item = timeline.pop()[1]
            if isinstance(item, int):
                self._complete(item)
            elif isinstance(item, AnyEvent):
                self._take(item)
            else:
                item()
        else:
            self._take(Tick())
        if self.faults is not None:
            self._inject(self.faults)
        return True

    def _may_go_on(self) -> bool:
        """Nothing is under way, yet a tick may move something: a reservation that ends."""
        now_us = self.now_us + self._skew_us
        return any(r.until_us > now_us for r in self.manager.state.reservations.values())

    def _arrive(self) -> None:
        """The prompt's text does not matter: zeros, which cost nothing before they are read."""
        number, request, prompt = self._arrived, self._requests[self._arrived], self.config.prompt
        self._arrived += 1
        outcome = Outcome(number, request.prompt_len, request.output_len, self.now_us)
        self.outcomes.append(outcome)
        self._open[number] = outcome
        self.executor.stop_at[number] = request.prompt_len + request.output_len - 2
        text = bytes(4 * request.prompt_len) if prompt is None else prompt(number, request.prompt_len)
        target = self._target(request.prompt_len)
        self._take(Arrived(number, text, request.max_tokens, stop_ids=(STOP,), target=target))

    def _target(self, prompt_len: int) -> Target:
        slo = self.config.slo if self.config.targets else None
        if slo is None:
            return NO_TARGET
        return Target(ttft_us=round(slo.ttft_s(prompt_len) * 1e6), tpot_us=round(slo.tpot_s * 1e6))

    def _complete(self, step: int) -> None:
        event = self.executor.finish(step, self.now_us)
        if self.faults is None:
            self._take(event)
        else:
            self._deliver(event, self.faults)

    def _take(self, event: AnyEvent) -> None:
        now_us = self.now_us
        commands = self.manager.handle(event, now_us + self._skew_us)
        self._digest(event, commands)
        for command in commands:
            kind = type(command)
            if kind is Emit:
                self.emit(command)  # type: ignore[arg-type]
            elif kind in _STEPS:
                self.executor.submit(command)  # type: ignore[arg-type]
            else:
                self._perform(command)
        self.executor.start_ready(now_us)
        self._num_events += 1
        if self.config.check_every and self._num_events % self.config.check_every == 0:
            self.manager.check()
        if self.config.progress is not None and self._num_events % PROGRESS_EVENTS == 0:
            self.config.progress(len(self.outcomes) - len(self._open), len(self.config.workload.requests))

    def ended(self, outcome: Outcome) -> None:
        """The text is as long as the sampler meant it to be."""
        if outcome.status == "finished" and outcome.emitted != outcome.output_len:
            raise InvariantError(f"INV-11: request {outcome.request} ended after {outcome.emitted} tokens")

    def emit(self, command: Emit) -> None:
        outcome = self._open[command.request]  # KeyError: a token after the end, INV-1
        if command.index != outcome.emitted:
            raise InvariantError(f"INV-11: token {command.index} of request {command.request} after {outcome.emitted}")
        if command.index == 0:
            outcome.first_us = self.now_us
        outcome.emitted += len(command.tokens)

    def _perform(self, command: AnyCommand) -> None:
        if isinstance(command, Finish):
            outcome = self._open.pop(command.request)  # KeyError: ended twice, INV-1
            outcome.last_us = self.now_us
            outcome.status = _STATUS[command.reason]
            self.ended(outcome)
        elif isinstance(command, Reject):
            self._open.pop(command.request).status = "rejected"
        elif isinstance(command, Prepare):
            ready = ProgramReady(command.program, command.instances)
            self.timeline.push(self.now_us + self.config.prepare_us, ready)
        else:
            self.executor.apply(command)

    def _digest(self, event: AnyEvent, commands: list[AnyCommand]) -> None:
        """What was sampled and when follows from the commands, so the events mostly stand for both."""
        if type(event) is Arrived:
            event = msgspec.structs.replace(event, prompt=len(event.prompt).to_bytes(8, "little"))
        self._hash.update(self._encode((self.now_us + self._skew_us, event)))
        if self.config.hash_commands:
            self._hash.update(codec.digest(commands))

    # ---- faults

    def _deliver(self, event: StepDone | StepFailed, faults: FaultPlan) -> None:
        """The host hears of it now, later, twice, or never; then the watchdog gives up the instances."""
        delays_us = faults.deliveries()
        for delay_us in delays_us:
            if delay_us:
                self.timeline.push(self.now_us + delay_us, event)
            else:
                self._take(event)
        if not delays_us:
            self.timeline.push(self.now_us + faults.faults.watchdog_us, lambda: self._give_up(event.step))

    def _give_up(self, step: int) -> None:
        record = self.manager.state.steps.get(step)
        if record is not None:
            self.executor.poison(record.instances)
            self._take(StepFailed(step, record.instances, "no answer"))

    def _inject(self, faults: FaultPlan) -> None:
        """What may happen to the world after each event."""
        self._skew_us += faults.jump_us()
        if self._open and faults.aborts():
            self._end_now(Aborted(faults.choose(sorted(self._open))))
        talking = sorted(request for request, outcome in self._open.items() if outcome.emitted)
        if talking and faults.stops():
            outcome = self._open[faults.choose(talking)]
            outcome.output_len = outcome.emitted  # a stop string was found in what there is
            self._end_now(Stopped(outcome.request, outcome.emitted))
        alive = [i for i in range(self.config.cluster.num_instances) if i not in self._lost]
        if len(alive) > 1 and faults.loses():
            instance = faults.choose(alive)
            self._lost.add(instance)
            self.executor.poison((instance,))
            self._take(InstanceLost(instance))
            self.timeline.push(self.now_us + faults.rejoin_us(), lambda: self._rejoin(instance))

    def _end_now(self, event: Aborted | Stopped) -> None:
        self._take(event)
        if event.request in self._open:
            raise InvariantError(f"INV-1: request {event.request} goes on after {type(event).__name__}")

    def _rejoin(self, instance: int) -> None:
        self._lost.discard(instance)
        self._take(InstanceJoined(instance))
