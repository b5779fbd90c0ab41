"""The manager: a deterministic state machine from events to commands (DESIGN 3, 4; LoongServe section 5).

What it is: `handle(event, now_us) -> [command]`. One event changes the state, then the policy plans for the instances
that have room until it has nothing more to say. Same events, same bytes of commands (INV-7): time is an argument, and
there is no randomness, no waiting and no I/O.
What it is not: a policy (`policy/`), the rules of a plan (`issue.py`), or an executor. It is not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Protocol

from loong_jax import forks, invariants, issue, kv_upkeep
from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.core_state import CoreState, Step
from loong_jax.cost import CostModel
from loong_jax.request_state import RequestState
from loong_jax.state_view import StateView
from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    CostUpdated,
    Drain,
    Emit,
    Finish,
    FinishReason,
    Forget,
    Forked,
    Free,
    InstanceJoined,
    InstanceLost,
    Plan,
    Prepare,
    ProgramReady,
    Reject,
    RejectReason,
    RequestFailed,
    Reset,
    StepDone,
    StepFailed,
    Stopped,
    Tick,
    Top,
    View,
)


class Policy(Protocol):
    """Floor 2. A function of the view and the cost model; it may cache, but not remember decisions."""

    def plan(self, view: View, cost: CostModel) -> Plan: ...


class Manager:
    def __init__(self, cluster: ClusterConfig, limits: LimitsConfig, policy: Policy, cost: CostModel) -> None:
        self.policy = policy
        self.cost = cost
        self.state = CoreState(cluster, limits)
        self._out: list[AnyCommand] = []

    def handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]:
        """Commands in the order in which every device must see them.

        Raises `PlanError` when the policy breaks a rule and `InvariantError` when the clock runs backwards: both are
        our bugs.
        """
        state = self.state
        if now_us < state.now_us:
            raise invariants.InvariantError(f"INV-3: the clock ran back from {state.now_us} to {now_us}")
        state.now_us = now_us
        self._out = []
        self._react(event)
        if state.held:
            self._out += forks.release(state)
        if state.blocked:
            self._unblock()
        self._plan()
        return self._out

    def check(self) -> None:
        """All invariants; cost grows with pages in use. Raises `InvariantError`."""
        invariants.check(self.state)

    def view(self) -> View:
        """What the policy sees now; it holds until the next event or plan."""
        return StateView(self.state)

    def describe(self) -> str:
        """The state as text: a line per instance and per request."""
        return invariants.describe(self.state)

    # ---- events

    def _react(self, event: AnyEvent) -> None:
        match event:
            case StepDone():
                self._on_step_done(event)
            case Arrived():
                self._on_arrived(event)
            case StepFailed():
                self._on_step_failed(event)
            case Aborted():
                self._on_aborted(event)
            case RequestFailed():
                self._on_request_failed(event)
            case Stopped():
                self._on_stopped(event)
            case Forked():
                self._on_forked(event)
            case ProgramReady():
                self._on_program_ready(event)
            case CostUpdated():
                self.cost = self.cost.updated(event.coefficients)
                self.state.changes += 1
            case InstanceLost():
                self._on_instance_lost(event)
            case InstanceJoined():
                self._on_instance_joined(event)
            case Drain():
                self.state.draining = True
            case Tick():
                pass  # only for the plan that follows every event

    def _on_arrived(self, event: Arrived) -> None:
        state = self.state
        if len(event.prompt) == 0 or len(event.prompt) % 4 or event.max_tokens < 1:
            raise ValueError(f"request {event.request}: empty or broken prompt, or max_tokens < 1")
        if event.num_prompt_top is not None and not state.cluster.ladder.score_tokens:
            raise ValueError(f"request {event.request}: the ladder has no scoring programs")
        state.num_admitted += 1
        request = RequestState(
            state.ledger,
            event.request,
            state.now_us,
            event.prompt,
            event.max_tokens,
            event.sampling,
            event.stop_ids,
            event.adjustment,
            event.num_prompt_top,
            target=event.target,
        )
        if self._admit(request):
            self._enqueue(request)

    def _admit(self, request: RequestState) -> bool:
        """Reject at once what can never be served or may not wait."""
        state = self.state
        if state.draining:
            self._reject(request, RejectReason.DRAINING, "the server is draining")
        elif not state.fits(request.end - 1):
            self._reject(request, RejectReason.TOO_LARGE, self._too_large(request))
        elif len(state.waiting) >= state.limits.max_waiting:
            message = f"{len(state.waiting)} requests are waiting; at most {state.limits.max_waiting} may"
            self._reject(request, RejectReason.QUEUE_FULL, message)
        else:
            return True
        return False

    def _too_large(self, request: RequestState) -> str:
        return (
            f"prompt of {request.prompt_len} tokens and max_tokens {request.max_tokens} need "
            f"{self.state.cluster.kv_needed(request.end - 1)} tokens of KV; the pool holds {self.state.capacity_tokens}"
        )

    def _reject(self, request: RequestState, reason: RejectReason, message: str) -> None:
        self.state.num_finished += 1
        self._out.append(Reject(request.id, reason, message))

    def _enqueue(self, request: RequestState) -> None:
        state = self.state
        assert request.id not in state.requests, f"request id {request.id} is used twice"
        state.enqueue(request)
        adjust = request.adjust()
        if adjust is not None:
            self._out.append(adjust)

    def _on_step_done(self, event: StepDone) -> None:
        step = self.state.close_step(event.step)
        if step is None:
            return
        if len(event.tokens) != len(step.samples) or len(event.logprobs) != len(step.samples):
            raise ValueError(f"step {event.step} samples {len(step.samples)} tokens, {len(event.tokens)} came")
        requests, dop, slides = self.state.requests, len(step.instances), self.state.cluster.kv_window > 0
        for (request_id, runs), scores in zip(step.scored, event.scores, strict=True):
            new = requests[request_id].take_scores(runs, scores) if request_id in requests else None
            if new is not None:
                self._out.append(new)
        tops = event.tops or repeat(None, len(step.samples))
        for (request_id, index), token, logprob, top in zip(
            step.samples, event.tokens, event.logprobs, tops, strict=True
        ):
            request = requests.get(request_id)
            if request is None:
                continue
            if index == len(request.tokens):
                self._append(request, token, logprob, dop, top)
                while request.early and request_id in requests and len(request.tokens) in request.early:
                    self._append(request, *request.early.pop(len(request.tokens)))
                if slides and request_id in requests:
                    self._out += kv_upkeep.slide(self.state, request)
            elif index > len(request.tokens):
                request.early[index] = (token, logprob, dop, top)
        for request_id in step.requests if self.state.failures else ():
            self.state.failures.pop(request_id, None)
        self._settle(step)

    def _append(self, request: RequestState, token: int, logprob: float, dop: int, top: Top | None) -> None:
        """The next token of the stream is known."""
        generated = len(request.tokens) - request.prompt_len
        request.tokens.append(token)
        if generated == 0:
            request.first_token_us = self.state.now_us
        if request.needs_history:  # may run again
            self.state.changes += 1
        self._out.append(Emit(request.id, generated, (token,), (logprob,), dop, () if top is None else (top,)))
        if self.state.held:  # before its pages may go
            self._out += forks.release(self.state)
        if token in request.stop_ids:
            self._finish(request, FinishReason.STOP, generated + 1)
        elif generated + 1 == request.max_tokens:
            self._finish(request, FinishReason.LENGTH, generated + 1)

    def _on_step_failed(self, event: StepFailed) -> None:
        step = self.state.close_step(event.step)
        lost = set(event.instances) | set(step.instances if step else ())
        self.state.blocked |= lost
        self._lose_kv(lost)
        if step is not None:
            self._count_failure(step, event.reason)
            self._settle(step)

    def _count_failure(self, step: Step, reason: str) -> None:
        """A request whose steps always fail would take its neighbours' KV along for ever."""
        state = self.state
        for request_id in step.requests:
            request = state.requests.get(request_id)
            if request is None:
                continue
            failures = state.failures[request_id] = state.failures.get(request_id, 0) + 1
            if failures >= state.limits.max_step_failures:
                message = f"{failures} steps in a row failed, the last with: {reason}"
                self._finish(request, FinishReason.ERROR, request.num_generated, message)

    def _on_instance_lost(self, event: InstanceLost) -> None:
        state = self.state
        if not state.alive[event.instance]:
            return
        state.alive[event.instance] = False
        state.blocked.add(event.instance)
        self._lose_kv({event.instance})
        for request in list(state.requests.values()):
            if not state.fits(request.end - 1):
                message = f"instance {event.instance} was lost: {self._too_large(request)}"
                self._finish(request, FinishReason.ERROR, request.num_generated, message)

    def _on_instance_joined(self, event: InstanceJoined) -> None:
        state = self.state
        state.changes += 1
        state.alive[event.instance] = True  # blocked since it was lost: it is reset before it gets a step

    def _on_aborted(self, event: Aborted) -> None:
        request = self.state.requests.get(event.request)
        if request is not None:
            self._finish(request, FinishReason.ABORT, request.num_generated)

    def _on_request_failed(self, event: RequestFailed) -> None:
        request = self.state.requests.get(event.request)
        if request is not None:
            self._finish(request, FinishReason.ERROR, request.num_generated, event.reason)

    def _on_stopped(self, event: Stopped) -> None:
        request = self.state.requests.get(event.request)
        if request is not None:
            self._finish(request, FinishReason.STOP, min(event.num_generated, request.num_generated))

    def _on_forked(self, event: Forked) -> None:
        state = self.state
        state.num_admitted += 1
        parent = state.requests.get(event.parent)
        if parent is None:
            state.num_finished += 1
            message = f"parent {event.parent} has finished"
            self._out.append(Finish(event.child, FinishReason.ERROR, 0, message))
            return
        child = forks.child_of(state, event, parent)
        if self._admit(child):
            self._enqueue(child)
            self._out += forks.start_or_hold(state, parent, child)

    def _on_program_ready(self, event: ProgramReady) -> None:
        key = (event.program, event.instances)
        self.state.ready |= {key}
        self.state.changes += 1
        self.state.preparing.discard(key)

    # ---- ends and losses

    def _finish(self, request: RequestState, reason: FinishReason, num_generated: int, message: str = "") -> None:
        """The only way out. Pages are free at once: a step in flight that still uses them was enqueued before any step
        that will be given them."""
        state = self.state
        self._out.append(Finish(request.id, reason, num_generated, message))
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            state.num_ended += 1
            state.num_output += num_generated
        if request.adjustment is not None:
            self._out.append(Forget(request.id))
        held = tuple(sorted(state.ledger.tokens(request.id)))
        if held:
            state.ledger.free(request.id, held)
            self._out.append(Free(request.id, held))
        state.remove(request)

    def _unblock(self) -> None:
        """Instances whose pool was lost get a new one when their last step in flight came back: until then the executor
        fails whatever is queued there."""
        state = self.state
        drained = tuple(i for i in sorted(state.blocked) if state.queued[i] == 0 and state.alive[i])
        if drained:
            state.blocked.difference_update(drained)
            state.changes += 1
            self._out.append(Reset(drained))

    def _lose_kv(self, instances: Iterable[int]) -> None:
        self._out += kv_upkeep.lose(self.state, instances)

    def _settle(self, step: Step) -> None:
        self._out += kv_upkeep.settle(self.state, step)

    # ---- planning

    def _plan(self) -> None:
        """Ask the policy until it has nothing more to say. Each round takes queue room or pages away, so it ends."""
        state = self.state
        while state.active or state.waiting:
            if not any(map(state.has_room, range(len(state.queued)))):
                return
            plan = self.policy.plan(self.view(), self.cost)
            if not self._apply(plan) or plan.final:
                return

    def _apply(self, plan: Plan) -> bool:
        """Whether the plan changed what another plan would see."""
        state, out = self.state, self._out
        before = len(out)
        for evict in plan.evicts:
            out.append(issue.evict(state, evict))
        if len(plan.decodes) + len(plan.prefills) + len(plan.migrates) > 1:
            _check_apart(plan)
        for migrate in plan.migrates:
            out.extend(issue.migrate(state, migrate))
        for prefill in plan.prefills:
            out.append(issue.prefill(state, prefill))
            for row in prefill.rows:
                out += kv_upkeep.slide(state, state.requests[row.request])
        for decode in plan.decodes:
            out.append(issue.decode(state, decode))
        changed = len(out) > before
        for prepare in plan.prepares:
            key = (prepare.program, prepare.instances)
            if key not in state.ready and key not in state.preparing:
                state.preparing.add(key)
                out.append(Prepare(prepare.program, prepare.instances))
        if plan.reservations or state.reservations:
            self._reserve(plan)
        return changed

    def _reserve(self, plan: Plan) -> None:
        """A reservation that is renewed keeps its end; one that is not renewed ends."""
        state = self.state
        kept = {}
        for reservation in plan.reservations:
            if reservation.until_us > state.now_us + state.limits.hold_us:
                raise issue.PlanError(f"INV-8: reservation beyond hold_us: {reservation}")
            kept[reservation.request] = state.reservations.get(reservation.request, reservation)
        state.reservations = kept


def _check_apart(plan: Plan) -> None:
    """No instance serves two groups."""
    busy: set[int] = set()
    pairs = [(migrate.rehome.src, migrate.rehome.dst) for migrate in plan.migrates]
    for instances in (*pairs, *(step.instances for step in (*plan.prefills, *plan.decodes))):
        if not busy.isdisjoint(instances):
            raise issue.PlanError(f"plan: an instance serves two groups: {instances}")
        busy.update(instances)
