"""Cancels in every state of a request, through the real server, manager and policy, over the mock executor at a pace.

A cancel is timed from the client's call to the manager's answer, which is when its pages are free. What it is not: the
figures (scripts/bench_cancel.py), or a device (the mock executor proves that no page is given away while it is used).
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import (
    Aborted,
    AnyCommand,
    AnyEvent,
    Arrived,
    Finish,
    Migrate,
    ProgramReady,
    RunDecode,
    RunPrefill,
    View,
)
from serving.client import LoongClient, generate_request
from serving.loop import EngineLoop
from serving.sampling_params import SamplingLimits
from serving.server import LoongServer, ServerConfig
from serving.state import EngineState
from serving.stream import RequestStream
from serving.validation import ValidationLimits
from tests.support.mock_executor import VOCAB, MockExecutor
from tests.support.schedules import arcs

STATES = ("queued", "prefilling", "scaling", "decoding", "finished")
_LADDER = LadderConfig(dops=(1, 2, 4), prefill_tokens=(16, 64), decode_rows=(1, 4))
CLUSTER = ClusterConfig(
    4, page_tokens=4, pages_per_instance=64, ring_tokens=64, query_tile_tokens=64, slots=8, ladder=_LADDER
)
LIMITS = LimitsConfig(max_running=8, max_waiting=256, chunk_tokens=64)


def num_streams() -> int:
    """Streams there are in this process."""
    gc.collect()
    return sum(1 for it in gc.get_objects() if isinstance(it, RequestStream))


class PacedMock:
    """The mock executor in a thread: each step takes `step_s`, counted from when its devices have done those before."""

    def __init__(self, post: Callable[[AnyEvent], None], step_s: float) -> None:
        self.mock = MockExecutor(CLUSTER, post, random.Random(0))
        self._post, self._step_s = post, step_s
        self._lock = threading.Condition()
        self._due_s: dict[int, float] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paced-mock", daemon=True)
        self._thread.start()

    def submit(self, command: AnyCommand) -> None:
        with self._lock:
            self.mock.submit(command)
            self._lock.notify()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join(5)

    def _run(self) -> None:
        with self._lock:
            while not self._closed:
                now_s = time.monotonic()
                for event in self.mock.take_late():
                    self._post(event)
                for step in self.mock.heads():
                    if self._due_s.setdefault(step, now_s + self._step_s) <= now_s:
                        del self._due_s[step]
                        self._post(self.mock.run(step))
                heads = self.mock.heads()
                if all(step in self._due_s for step in heads):
                    wait_s = min((self._due_s[step] - now_s for step in heads), default=1.0)
                    self._lock.wait(max(0.0, wait_s))


class Watched:
    """The manager, and in which state each request is. Requests are known by their seeds."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.cancelled_in: dict[int, str] = {}
        self.freed_s: dict[int, float] = {}
        self._wanted: dict[int, tuple[str, Callable[[], object]]] = {}
        self._seeds: dict[int, int] = {}
        self._groups: dict[int, tuple[int, ...]] = {}
        self._states: dict[int, str] = {}

    def expect(self, seed: int, state: str, reached: Callable[[], object]) -> None:
        """Have `reached` called, in the engine's thread, when the request is first in this state."""
        self._wanted[seed] = (state, reached)

    def forget(self) -> None:
        self.cancelled_in, self.freed_s, self._wanted, self._seeds = {}, {}, {}, {}

    def view(self) -> View:
        return self.manager.view()

    def handle(self, event: AnyEvent, now_us: int) -> list[AnyCommand]:
        if isinstance(event, Arrived):
            self._seeds[event.request] = event.sampling.seed
            self._enter(event.request, "queued")
        was = self._states.get(event.request, "finished") if isinstance(event, Aborted) else ""
        out = self.manager.handle(event, now_us)
        if isinstance(event, Aborted) and event.request in self._seeds:
            seed = self._seeds[event.request]
            self.cancelled_in[seed], self.freed_s[seed] = was, time.monotonic()
        for command in out:
            self._saw(command)
        for request in [request for request, state in self._states.items() if state in ("queued", "finished")]:
            self._tell(request)
            if self._states[request] == "finished":
                del self._states[request]
                self._groups.pop(request, None)
        return out

    def _saw(self, command: AnyCommand) -> None:
        if isinstance(command, RunPrefill):
            for row in command.rows:
                self._groups[row.request] = command.instances
                self._enter(row.request, "prefilling")
        elif isinstance(command, RunDecode):
            for row in command.rows:
                same = self._groups.get(row.request) == command.instances
                self._groups[row.request] = command.instances
                self._enter(row.request, "decoding" if same else "scaling")
        elif isinstance(command, Migrate):
            for request in {move.request for move in command.moves}:
                self._enter(request, "scaling")
        elif isinstance(command, Finish):
            self._enter(command.request, "finished")

    def _enter(self, request: int, state: str) -> None:
        self._states[request] = state
        if state != "queued":  # which only lasts when no step is issued for it at once
            self._tell(request)

    def _tell(self, request: int) -> None:
        seed = self._seeds[request]
        wanted = self._wanted.get(seed)
        if wanted is not None and wanted[0] == self._states[request]:
            del self._wanted[seed]
            wanted[1]()


class Cancels:
    """A server, a client in the same asyncio loop, and what was measured."""

    def __init__(self, step_s: float) -> None:
        limits = ValidationLimits(
            sampling=SamplingLimits(VOCAB, adjust_tokens=8), max_position=512, pool_tokens=CLUSTER.pool_tokens
        )
        manager = Manager(CLUSTER, LIMITS, POLICIES["elastic"](CLUSTER, LIMITS), unmeasured(_LADDER))
        self.watched = Watched(manager)
        self.loop = EngineLoop(self.watched, EngineState(kv_token_bytes=1, compiles_after_ready=int))
        self._limits = limits
        self.latencies_s: dict[str, list[float]] = {}
        self.missed: Counter[str] = Counter()
        self._step_s = step_s
        self._rng = random.Random(1)
        self._seed = 0

    async def __aenter__(self) -> Cancels:
        self._num_streams = num_streams()
        self.server = LoongServer(self.loop, None, self._limits, ServerConfig(port=0))
        port = await self.server.start()
        self.executor = PacedMock(self.loop.post, self._step_s)
        for program, instances in arcs(CLUSTER):
            self.loop.post(ProgramReady(program, instances))
        self.loop.start(self.executor, (), asyncio.get_running_loop())
        await self.server.ready()
        self._client = await LoongClient(f"127.0.0.1:{port}").__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.__aexit__(*exc_info)
        await self.server.stop()
        await asyncio.to_thread(self.loop.close)

    async def run(self, num_each: int, num_clients: int) -> None:
        """So many cancels in each state, by clients side by side; then nothing may be left."""
        self.latencies_s = {state: [] for state in STATES}
        await asyncio.gather(*(self._cancel_many(self._client, num_each) for _ in range(num_clients)))
        await self._idle()
        self.check_nothing_is_left()

    def forget(self) -> None:
        """What was written down of single requests."""
        self.latencies_s = {}
        self.watched.forget()

    async def _cancel_many(self, client: LoongClient, num_each: int) -> None:
        while True:
            missing = [state for state in STATES if len(self.latencies_s[state]) < num_each]
            if not missing:
                return
            await self._cancel(client, self._rng.choice(missing))

    async def _cancel(self, client: LoongClient, state: str) -> None:
        asyncio_loop, self._seed = asyncio.get_running_loop(), self._seed + 1
        seed, reached = self._seed, asyncio.Event()
        self.watched.expect(seed, state, lambda: asyncio_loop.call_soon_threadsafe(reached.set))
        rng = self._rng
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((3, 10, 40, 90)))]
        max_tokens = rng.choice((2, 4)) if state == "finished" else 60
        call = client.stub.Generate(generate_request(prompt, max_tokens=max_tokens, seed=seed))
        try:
            async with asyncio.timeout(2):
                await reached.wait()
        except TimeoutError:  # it went another way, as one that never had to wait
            call.cancel()
            self.missed[state] += 1
            return
        start_s = time.monotonic()
        call.cancel()
        if state == "finished":  # its pages were free before
            self.latencies_s[state].append(0.0)
            return
        while seed not in self.watched.freed_s:
            if time.monotonic() - start_s > 5:
                self.missed[state] += 1  # it ended by itself before
                return
            await asyncio.sleep(0.002)
        self.latencies_s[self.watched.cancelled_in[seed]].append(self.watched.freed_s[seed] - start_s)

    async def _idle(self) -> None:
        deadline_s = time.monotonic() + 20
        while self.watched.manager.state.requests or self.executor.mock.steps_in_flight:
            assert time.monotonic() < deadline_s, "requests are left"
            await asyncio.sleep(0.01)
        await self.server.generator.idle()
        await asyncio.sleep(0.1)

    def check_nothing_is_left(self) -> None:
        """No page, sink, stream, task of a call."""
        manager = self.watched.manager
        manager.check()
        for instance in manager.view().instances:
            assert instance.free_pages == instance.num_pages, instance
        assert not self.executor.mock.pages_in_use
        assert not self.loop._boxes
        streams = num_streams() - self._num_streams
        assert streams <= 0, f"{streams} streams are left"
        calls = [task.get_name() for task in asyncio.all_tasks() if "Generate" in task.get_name()]
        assert not calls, calls
