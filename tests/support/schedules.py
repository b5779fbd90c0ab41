"""Random schedules: manager, policy and executor under arrivals, aborts, stops, forks, failures and late answers.

What it is: a driver that checks every invariant after every event, works with any executor (`submit`, and a `post` that
puts events into a queue), and can replay what happened. Time is a counter: nothing here depends on the clock.
What it is not: the live loop, or a judge of tokens: the caller compares `Outcome`s with its own oracle.
"""

from __future__ import annotations

import queue
import random
from array import array
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from loong_jax import codec
from loong_jax.config import ClusterConfig
from loong_jax.manager import Manager
from loong_jax.types import (
    Aborted,
    Adjustment,
    AnyCommand,
    AnyEvent,
    Arrived,
    Emit,
    EmitScores,
    Finish,
    FinishReason,
    Forked,
    InstanceJoined,
    InstanceLost,
    Phase,
    Program,
    ProgramReady,
    Reject,
    Sampling,
    Scores,
    Stopped,
    Tick,
    Top,
)


class Executor(Protocol):
    def submit(self, command: AnyCommand) -> None: ...


class Controls(NamedTuple):
    """What the driver may do to the executor besides `submit`; None where it cannot, and then it is not injected."""

    advance: Callable[[], None] | None = None  # let something happen; None: completions come by themselves
    fail: Callable[[int], None] | None = None  # make this step fail
    lose: Callable[[int], None] | None = None  # kill an instance
    steps_in_flight: Callable[[], list[int]] | None = None


class ScheduleConfig(NamedTuple):
    """Probabilities are per round of the driver."""

    num_requests: int = 6
    max_prompt: int = 60
    max_new_tokens: int = 12
    vocab: int = 97
    p_arrive: float = 0.3
    p_abort: float = 0.01
    p_stop: float = 0.01
    p_fork: float = 0.02
    p_fail: float = 0.01
    p_lose: float = 0.003
    p_stop_ids: float = 0.3
    p_adjust: float = 0.35
    p_top: float = 0.2
    p_score: float = 0.15  # where the ladder has scoring programs
    greedy: bool = False
    wait_s: float = 120.0
    max_rounds: int = 20_000


class Outcome(NamedTuple):
    """What became of one request. `history` is its prompt (for a fork, its parent's tokens at the fork)."""

    request: int
    history: array[int]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_tokens: int
    tokens: list[int]
    logprobs: list[float]
    end: Finish | Reject
    adjustment: Adjustment | None
    num_prompt_top: int | None
    tops: list[Top]
    scores: list[Scores]


class ScheduleRun(NamedTuple):
    outcomes: list[Outcome]
    events: list[tuple[int, AnyEvent]]
    commands: list[bytes]  # per event


class _Live:
    def __init__(
        self,
        history: array[int],
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        max_tokens: int,
        adjustment: Adjustment | None,
        num_prompt_top: int | None = None,
    ) -> None:
        self.history, self.sampling, self.stop_ids, self.max_tokens = history, sampling, stop_ids, max_tokens
        self.adjustment, self.num_prompt_top = adjustment, num_prompt_top
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.scores: list[Scores] = []
        self.num_scored = 1


def arcs(cluster: ClusterConfig) -> list[tuple[Program, tuple[int, ...]]]:
    """Every program of the ladder on every arc of neighbours (and every pair, for migration)."""
    n, out = cluster.num_instances, set()
    for program in cluster.ladder.programs():
        for first in range(n):
            if program.phase is Phase.MIGRATE:
                out |= {(program, (first, other)) for other in range(first + 1, n)}
            else:
                out.add((program, tuple(sorted((first + k) % n for k in range(program.dop)))))
    return sorted(out)


class Schedule:
    """One run. `inbox` is where the executor's `post` puts events."""

    def __init__(
        self,
        manager: Manager,
        executor: Executor,
        inbox: queue.SimpleQueue[AnyEvent],
        config: ScheduleConfig,
        rng: random.Random,
        controls: Controls = Controls(),  # noqa: B008 (an immutable record)
        ready: list[tuple[Program, tuple[int, ...]]] | None = None,
    ) -> None:
        self.manager, self.executor, self.inbox, self.config, self.rng = manager, executor, inbox, config, rng
        self.controls = controls
        self.ready = ready if ready is not None else arcs(manager.state.cluster)
        self.now_us = 0
        self.next_request = 0
        self.arrived = 0
        self.lost: set[int] = set()
        self.live: dict[int, _Live] = {}
        self.outcomes: list[Outcome] = []
        self.events: list[tuple[int, AnyEvent]] = []
        self.commands: list[bytes] = []

    def run(self) -> ScheduleRun:
        for program, instances in self.ready:
            self.handle(ProgramReady(program, instances))
        for _ in range(self.config.max_rounds):
            if self.arrived == self.config.num_requests and not self.live:
                break
            self._inject()
            self._complete()
        else:
            raise AssertionError(f"no end after {self.config.max_rounds} rounds\n{self.manager.describe()}")
        while self.manager.state.steps:
            self._complete()
        self._check_drained()
        return ScheduleRun(self.outcomes, self.events, self.commands)

    def handle(self, event: AnyEvent) -> None:
        """One event through the manager; its commands through the codec to the executor and the streams."""
        self.now_us += self.rng.randint(0, 1000)
        self.events.append((self.now_us, event))
        commands = self.manager.handle(event, self.now_us)
        encoded = [codec.encode_command(command) for command in commands]
        self.commands.append(b"".join(encoded))
        for data in encoded:
            command = codec.decode_command(data)
            if isinstance(command, Emit):
                self._emit(command)
            elif isinstance(command, EmitScores):
                self._emit_scores(command)
            elif isinstance(command, Finish | Reject):
                live = self.live.pop(command.request)  # KeyError: ended twice, INV-1
                self.outcomes.append(
                    Outcome(
                        command.request, live.history, live.sampling, live.stop_ids, live.max_tokens,
                        live.tokens, live.logprobs, command, live.adjustment, live.num_prompt_top, live.tops,
                        live.scores,
                    )
                )  # fmt: skip
            else:
                self.executor.submit(command)
        self.manager.check()

    def _emit(self, command: Emit) -> None:
        live = self.live[command.request]
        assert command.index == len(live.tokens), f"INV-1: token {command.index} of {command.request} out of order"
        live.tokens += command.tokens
        live.logprobs += command.logprobs
        live.tops += command.tops
        assert len(live.tops) == (len(live.tokens) if live.sampling.num_top else 0)

    def _emit_scores(self, command: EmitScores) -> None:
        live = self.live[command.request]
        assert live.num_prompt_top == command.scores.k, "scores nobody asked for"
        assert command.first == live.num_scored, f"INV-1: scores from {command.first} of {command.request} out of order"
        live.num_scored += len(command.scores.logprobs) // 4
        live.scores.append(command.scores)

    # ---- what happens

    def _complete(self) -> None:
        if self.controls.advance is not None:
            if self.inbox.empty():
                self.controls.advance()
            while not self.inbox.empty():
                self.handle(self.inbox.get())
        elif self.manager.state.steps:
            self.handle(self.inbox.get(timeout=self.config.wait_s))

    def _inject(self) -> None:
        rng, config = self.rng, self.config
        if self.arrived < config.num_requests and (rng.random() < config.p_arrive or not self.live):
            self._arrive()
        if self.live:
            request = rng.choice(sorted(self.live))
            live = self.live[request]
            if rng.random() < config.p_abort:
                self.handle(Aborted(request))
            elif rng.random() < config.p_stop and live.tokens:
                self.handle(Stopped(request, rng.randint(1, len(live.tokens))))
            elif rng.random() < config.p_fork and self.next_request < 4 * config.num_requests:
                self._fork(request, live)
        self._break_something()
        if rng.random() < 0.02:
            self.handle(Tick())

    def _sampling(self) -> Sampling:
        rng = self.rng
        greedy = self.config.greedy or rng.random() < 0.5
        seed = rng.getrandbits(31)
        num_top = rng.choice((1, 5, 20)) if rng.random() < self.config.p_top else 0
        if greedy:
            return Sampling(seed=seed, num_top=num_top)
        min_p = rng.choice((0.0, 0.05))
        return Sampling(temperature=0.8, top_k=20, top_p=0.95, seed=seed, min_p=min_p, num_top=num_top)

    def _adjustment(self) -> Adjustment | None:
        """Half of them with penalties or a grammar, whose rows are never one step late."""
        rng, vocab = self.rng, self.config.vocab
        if rng.random() >= self.config.p_adjust:
            return None
        bias = {rng.randrange(vocab): rng.choice((-100.0, -1.5, 2.0)) for _ in range(rng.choice((0, 1, 8)))}
        adjustment = Adjustment(tuple(sorted(bias.items())), rng.choice((0, 0, 3, 50)))
        if rng.random() < 0.5:
            return adjustment
        if rng.random() < 0.4:
            return msgspec.structs.replace(adjustment, min_tokens=0, grammar=rng.choice("abc"))
        penalties = (rng.choice((1.0, 1.2, 0.8)), rng.choice((0.0, 0.4, -0.5)), rng.choice((0.0, 0.3, -0.6)))
        return Adjustment(adjustment.logit_bias, adjustment.min_tokens, *penalties)

    def _arrive(self) -> None:
        rng, config = self.rng, self.config
        self.arrived += 1
        length = rng.choice((1, 2, rng.randint(1, 12), rng.randint(1, config.max_prompt), config.max_prompt))
        prompt = array("i", [rng.randrange(config.vocab) for _ in range(length)])
        num_stop_ids = 2 if rng.random() < config.p_stop_ids else 0
        stop_ids = tuple(rng.randrange(config.vocab) for _ in range(num_stop_ids))
        scored = self.manager.state.cluster.ladder.score_tokens and rng.random() < config.p_score
        num_prompt_top = rng.choice((0, 3, 20)) if scored else None
        live = _Live(
            prompt,
            self._sampling(),
            stop_ids,
            rng.randint(1, config.max_new_tokens),
            self._adjustment(),
            num_prompt_top,
        )
        request, self.next_request = self.next_request, self.next_request + 1
        self.live[request] = live
        self.handle(
            Arrived(
                request, prompt.tobytes(), live.max_tokens, live.sampling, stop_ids, live.adjustment, num_prompt_top
            )
        )
        if rng.random() < config.p_fork:
            self._fork(request, live)  # at the prompt, before anything is known

    def _fork(self, parent: int, live: _Live) -> None:
        """From all tokens, or from the prompt, as the choices of one request are."""
        known = len(live.history) if self.rng.random() < 0.5 or not live.tokens else 0
        history = array("i", live.history) if known else live.history + array("i", live.tokens)
        max_tokens = self.rng.randint(1, self.config.max_new_tokens)
        child = _Live(history, self._sampling(), live.stop_ids, max_tokens, self._adjustment())
        request, self.next_request = self.next_request, self.next_request + 1
        self.live[request] = child
        self.handle(Forked(parent, request, child.max_tokens, child.sampling, child.stop_ids, child.adjustment, known))

    def _break_something(self) -> None:
        rng, config, controls = self.rng, self.config, self.controls
        if controls.fail is not None and controls.steps_in_flight is not None and rng.random() < config.p_fail:
            steps = controls.steps_in_flight()
            if steps:
                controls.fail(rng.choice(steps))
        if controls.lose is None:
            return
        for instance in sorted(self.lost):
            if rng.random() < 0.05:
                self.lost.remove(instance)
                self.handle(InstanceJoined(instance))
        if rng.random() < config.p_lose and len(self.lost) < self.manager.state.cluster.num_instances - 1:
            instance = rng.choice([i for i, alive in enumerate(self.manager.state.alive) if alive])
            self.lost.add(instance)
            controls.lose(instance)
            self.handle(InstanceLost(instance))

    def _check_drained(self) -> None:
        state = self.manager.state
        assert not state.requests, self.manager.describe()
        assert not state.steps, self.manager.describe()
        pages = state.cluster.pages_per_instance
        assert all(state.ledger.free_pages(i) == pages for i in range(len(state.queued))), "a page leaked"
        assert len(state.free_slots) == state.cluster.slots, "a slot leaked"
        assert state.num_admitted == state.num_finished == len(self.outcomes), "INV-1"


def replay(run: ScheduleRun, manager: Manager) -> None:
    """INV-7: a fresh manager (and a fresh policy of the same seed) gives the same bytes."""
    for index, ((now_us, event), expected) in enumerate(zip(run.events, run.commands, strict=True)):
        again = codec.decode_event(codec.encode_event(event))
        assert again == event, event
        commands = b"".join(codec.encode_command(command) for command in manager.handle(again, now_us))
        assert commands == expected, f"INV-7: event {index} {event}\n{manager.describe()}"


Oracle = Callable[[array, Sampling, int, Adjustment | None, tuple[int, ...]], list[int]]


def expected_tokens(outcome: Outcome, oracle: Oracle) -> list[int]:
    """What the oracle says the request's stream is a prefix of: cut at its first stop id."""
    tokens = oracle(outcome.history, outcome.sampling, outcome.max_tokens, outcome.adjustment, outcome.stop_ids)
    for index, token in enumerate(tokens):
        if token in outcome.stop_ids:
            return tokens[: index + 1]
    return tokens


def check_outcome(outcome: Outcome, oracle: Oracle) -> None:
    """INV-11: the stream is a prefix of the oracle's; all of it when the request ran to its own end."""
    expected = expected_tokens(outcome, oracle)
    assert outcome.tokens == expected[: len(outcome.tokens)], (outcome, expected)
    if outcome.tokens and outcome.num_prompt_top is not None:
        scored = sum(len(part.logprobs) // 4 for part in outcome.scores)
        assert scored == len(outcome.history) - 1, "the prompt's scores come before the first token"
    if isinstance(outcome.end, Reject):
        assert not outcome.tokens
    elif outcome.end.reason is FinishReason.LENGTH:
        assert len(outcome.tokens) == outcome.max_tokens == outcome.end.num_generated, outcome
    elif outcome.end.reason is FinishReason.STOP:
        assert outcome.end.num_generated <= len(outcome.tokens), outcome
