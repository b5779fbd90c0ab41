"""A manager and an executor with hand-computable answers: generated token i of a prompt p is p[i % len(p)] (an echo).

For tests of the shell (loop, server, client, CLI): no JAX, no policy. The manager runs one step at a time: prefills on
all instances, decodes on instance 0 and 1; a request's pages all lie on one instance. The executor can be held, slowed,
made to fail a step, or to raise.
"""

import queue
import struct
import threading
import time
from array import array
from collections.abc import Callable

from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    ContextForm,
    DecodeRow,
    Drain,
    Emit,
    EmitScores,
    Finish,
    FinishReason,
    Fork,
    Forked,
    Free,
    InstanceView,
    Phase,
    PrefillRow,
    Program,
    ProgramReady,
    Reject,
    RejectReason,
    Run,
    RunDecode,
    RunPrefill,
    Scores,
    StepDone,
    StepFailed,
    Stopped,
    Top,
    View,
)
from tests.support.views import SeenView

NEEDED = ((Program(Phase.PREFILL, 1, 16), (0,)), (Program(Phase.DECODE, 1, 1), (0,)))


def echo(prompt: list[int], num_tokens: int) -> list[int]:
    """What the fake engine generates."""
    return [prompt[i % len(prompt)] for i in range(num_tokens)]


def token_ids(tokens: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(tokens) // 4}i", tokens))


def fake_top(token: int, num_top: int) -> Top:
    """The token itself, then the ones after it."""
    return Top(tuple(range(token, token + num_top)), tuple(-float(token + k) for k in range(num_top)))


def fake_scores(targets: list[int], num_top: int) -> Scores:
    """Minus the token, as for generated ones; the likeliest are `fake_top`."""
    tops = [fake_top(token, num_top) for token in targets]
    return Scores(
        array("f", [-float(token) for token in targets]).tobytes(),
        num_top,
        array("i", [token for top in tops for token in top.tokens]).tobytes(),
        array("f", [value for top in tops for value in top.logprobs]).tobytes(),
    )


class _Request:
    def __init__(self, event: Arrived, instance: int, page_tokens: int):
        self.event, self.instance = event, instance
        self.prompt = token_ids(event.prompt)
        self.generated: list[int] = []
        self.num_pages = -(-(len(self.prompt) + event.max_tokens) // page_tokens)


class FakeManager:
    def __init__(self, *, num_instances: int = 4, pages: int = 256, page_tokens: int = 4, max_waiting: int = 8):
        self.num_instances, self.pages, self.page_tokens = num_instances, pages, page_tokens
        self.max_waiting, self.max_running = max_waiting, 64
        self.waiting: dict[int, _Request] = {}
        self.running: dict[int, _Request] = {}
        self.in_step: dict[int, tuple[int, ...]] = {}  # step -> requests; one at most
        self.num_steps = 0
        self.draining = False
        self.ticks = 0
        self._dops: dict[int, int] = {}

    def handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]:
        out: list[AnyCommand] = []
        match event:
            case Arrived():
                self._arrived(event, out)
            case Forked():
                self._forked(event, out)
            case StepDone():
                self._step_done(event, out)
            case StepFailed():
                for request in self.in_step.pop(event.step):
                    if request in self.running:
                        self._end(request, FinishReason.ERROR, out, message=f"step failed: {event.reason}")
            case Aborted():
                self._end(event.request, FinishReason.ABORT, out)
            case Stopped():
                self._end(event.request, FinishReason.STOP, out, num_generated=event.num_generated)
            case Drain():
                self.draining = True
            case _:
                self.ticks += 1
        if not self.in_step:
            self._plan(out)
        return out

    def view(self) -> View:
        used = [0] * self.num_instances
        for request in self.running.values():
            used[request.instance] += request.num_pages
        instances = tuple(
            InstanceView(i, self.pages - used[i], self.pages, len(self.in_step), 0, True)
            for i in range(self.num_instances)
        )
        return SeenView(self.page_tokens, instances)

    def _arrived(self, event: Arrived, out: list[AnyCommand]) -> None:
        request = _Request(event, event.request % self.num_instances, self.page_tokens)
        if self.draining:
            out.append(Reject(event.request, RejectReason.DRAINING, "the server is draining"))
        elif request.num_pages > self.pages * self.num_instances:
            out.append(Reject(event.request, RejectReason.TOO_LARGE, f"needs {request.num_pages} pages"))
        elif len(self.waiting) >= self.max_waiting:
            out.append(Reject(event.request, RejectReason.QUEUE_FULL, f"{self.max_waiting} requests wait"))
        else:
            self.waiting[event.request] = request

    def _forked(self, event: Forked, out: list[AnyCommand]) -> None:
        """As if it had arrived by itself."""
        parent = self.waiting.get(event.parent) or self.running.get(event.parent)
        if parent is None:
            out.append(Finish(event.child, FinishReason.ERROR, 0, "no parent"))
            return
        prompt = parent.event.prompt[: 4 * event.known]
        self._arrived(
            Arrived(event.child, prompt, event.max_tokens, event.sampling, event.stop_ids, event.adjustment), out
        )
        if event.child in self.waiting:
            out.append(Fork(event.parent, event.child, ()))

    def _plan(self, out: list[AnyCommand]) -> None:
        step = self.num_steps
        if self.waiting and len(self.running) < self.max_running:
            started = {number: self.waiting.pop(number) for number in list(self.waiting)}
            self.running |= started
            rows = tuple(
                PrefillRow(
                    number, 0, (Run(0, len(r.prompt)),), r.event.prompt, (r.instance,), (0,), True, r.event.sampling
                )
                for number, r in started.items()
            )
            out.append(RunPrefill(step, tuple(range(self.num_instances)), 16, ContextForm.RING, rows))
            dop = self.num_instances
        elif self.running:
            rows = tuple(
                DecodeRow(n, 0, len(r.prompt) + len(r.generated) - 1, -1, 0, 0, Run(0, 1), r.event.sampling)
                for n, r in self.running.items()
            )
            out.append(RunDecode(step, (0, 1), 8, rows))
            dop = 2
        else:
            return
        self.num_steps += 1
        self._dops[step] = dop
        self.in_step[step] = tuple(row.request for row in rows)

    def _step_done(self, event: StepDone, out: list[AnyCommand]) -> None:
        dop = self._dops.pop(event.step)
        for number, token, logprob in zip(self.in_step.pop(event.step), event.tokens, event.logprobs, strict=True):
            request = self.running.get(number)
            if request is None:
                continue
            num_top = request.event.sampling.num_top
            if request.event.num_prompt_top is not None and not request.generated and len(request.prompt) > 1:
                out.append(EmitScores(number, 1, fake_scores(request.prompt[1:], request.event.num_prompt_top)))
            tops = (fake_top(token, num_top),) if num_top else ()
            out.append(Emit(number, len(request.generated), (token,), (logprob,), dop, tops))
            request.generated.append(token)
            if token in request.event.stop_ids:
                self._end(number, FinishReason.STOP, out)
            elif len(request.generated) == request.event.max_tokens:
                self._end(number, FinishReason.LENGTH, out)

    def _end(
        self, number: int, reason: FinishReason, out: list[AnyCommand], *, num_generated: int = -1, message: str = ""
    ) -> None:
        request = self.waiting.pop(number, None) or self.running.pop(number, None)
        if request is not None:
            kept = len(request.generated) if num_generated < 0 else num_generated
            out.append(Finish(number, reason, kept, message))
            out.append(Free(number, (request.instance,)))


class FakeExecutor:
    """Answers steps from a thread of its own, after `step_s`; a token's logprob is minus its id."""

    def __init__(self, post: Callable[[AnyEvent], None], *, step_s: float = 0.0, ready: bool = True):
        self.post, self.step_s = post, step_s
        self.running = threading.Event()  # clear: steps wait
        self.running.set()
        self.fail_next = False
        self.raise_next = False
        self.submitted: list[AnyCommand] = []
        self._sequences: dict[int, list[int]] = {}
        self._steps: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        if ready:
            self.become_ready()

    def become_ready(self) -> None:
        for program, instances in NEEDED:
            self.post(ProgramReady(program, instances))

    def submit(self, command: AnyCommand) -> None:
        if self.raise_next:
            raise RuntimeError("the device fell off")
        self.submitted.append(command)
        if isinstance(command, RunPrefill | RunDecode):
            self._steps.put(command)

    def close(self) -> None:
        self.running.set()
        self._steps.put(None)
        self._thread.join(5)

    def _answer(self) -> None:
        while (command := self._steps.get()) is not None:
            if self.step_s:
                time.sleep(self.step_s)
            self.running.wait()
            if self.fail_next:
                self.fail_next = False
                self.post(StepFailed(command.step, command.instances, "the test says so"))
                continue
            tokens = tuple(self._next(command, row) for row in command.rows)
            self.post(StepDone(command.step, tokens, tuple(-float(token) for token in tokens)))

    def _next(self, command: RunPrefill | RunDecode, row: PrefillRow | DecodeRow) -> int:
        if isinstance(row, PrefillRow):
            self._sequences[row.request] = token_ids(row.tokens)
            return self._sequences[row.request][0]
        prompt = self._sequences[row.request]
        return prompt[(row.position + 1 - len(prompt)) % len(prompt)]
