"""The live loop: order, coalescing, the event log, the clock, and what it costs."""

import asyncio
import threading
import time

import pytest

from loong_jax.types import (
    Arrived,
    Emit,
    Finish,
    InstanceView,
    Reject,
    RunDecode,
    Sampling,
    StepDone,
    Tick,
    View,
)
from serving.errors import EngineFailed
from serving.loop import Crashed, EngineLoop, Prefilled
from serving.state import EngineState
from tests.support.fake_engine import FakeExecutor, FakeManager, echo


class ListLog:
    def __init__(self):
        self.frames, self.flushed, self.closed = [], 0, False

    def write(self, now_us, event, commands):
        self.frames.append((now_us, event, tuple(commands)))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed = True


class ListSink:
    def __init__(self):
        self.items, self.threads = [], set()
        self.done = asyncio.Event()

    def put(self, item, now_us):
        self.items.append(item)
        self.threads.add(threading.current_thread().name)
        if isinstance(item, Finish | Reject | Crashed):
            self.done.set()


def new_state() -> EngineState:
    return EngineState(kv_token_bytes=1, compiles_after_ready=lambda: 0)


def prompt(*tokens: int) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def test_events_are_logged_in_order_with_their_commands_and_sinks_run_in_asyncio():
    async def run():
        log, sink = ListLog(), ListSink()
        loop = EngineLoop(FakeManager(), new_state(), event_log=log)
        loop.start(FakeExecutor(loop.post), (), asyncio.get_running_loop())
        assert loop.arrive(prompt(1, 2), 5, Sampling(), (), sink) == 0
        await asyncio.wait_for(sink.done.wait(), 5)
        await asyncio.to_thread(loop.close)
        assert sink.threads == {threading.current_thread().name}
        assert isinstance(sink.items[0], Prefilled)
        emitted = [token for item in sink.items if isinstance(item, Emit) for token in item.tokens]
        assert emitted == echo([1, 2], 5)
        times = [frame[0] for frame in log.frames]
        assert times == sorted(times)
        replayed = FakeManager()
        for now_us, event, commands in log.frames:
            assert tuple(replayed.handle(event, now_us)) == commands
        assert log.flushed
        assert log.closed

    asyncio.run(run())


def test_ticks_only_while_requests_are_open():
    async def run():
        log, sink = ListLog(), ListSink()
        loop = EngineLoop(FakeManager(), new_state(), event_log=log)
        executor = FakeExecutor(loop.post)
        loop.start(executor, (), asyncio.get_running_loop())
        await asyncio.sleep(0.3)
        assert not any(isinstance(frame[1], Tick) for frame in log.frames)
        executor.running.clear()
        request = loop.arrive(prompt(1), 3, Sampling(), (), sink)
        await asyncio.sleep(0.35)
        assert 2 <= sum(isinstance(frame[1], Tick) for frame in log.frames) <= 4
        loop.abort(request)
        await asyncio.wait_for(sink.done.wait(), 5)
        executor.running.set()
        await asyncio.to_thread(loop.close)

    asyncio.run(run())


def test_a_closed_loop_tells_open_requests_and_takes_no_more():
    async def run():
        crashes, sink = [], ListSink()
        loop = EngineLoop(FakeManager(), new_state(), on_crash=crashes.append)
        executor = FakeExecutor(loop.post)
        executor.running.clear()
        loop.start(executor, (), asyncio.get_running_loop())
        loop.arrive(prompt(1), 3, Sampling(), (), sink)
        question = loop.ask_state()
        await asyncio.to_thread(loop.close)
        await asyncio.wait_for(sink.done.wait(), 5)
        assert isinstance(sink.items[-1], Crashed)
        assert question.result(5).requests_running == 1
        assert crashes == ["the server has stopped"]
        with pytest.raises(EngineFailed):
            loop.arrive(prompt(1), 3, Sampling(), (), ListSink())
        with pytest.raises(EngineFailed):
            loop.ask_state()
        loop.close()

    asyncio.run(run())


def test_a_question_nobody_waits_for_harms_nothing():
    async def run():
        sink = ListSink()
        manager = FakeManager()
        loop = EngineLoop(manager, new_state())
        loop.post(Tick())
        executor = FakeExecutor(loop.post)
        loop.start(executor, (), asyncio.get_running_loop())
        for _ in range(50):
            loop.ask_state().cancel()
        manager.view = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(loop.ask_state())
        loop.arrive(prompt(1), 2, Sampling(), (), sink)
        await asyncio.wait_for(sink.done.wait(), 5)
        await asyncio.to_thread(loop.close)

    asyncio.run(run())


class NullManager:
    """Answers each StepDone with the next decode of the same rows: what is left is the loop's own cost."""

    def __init__(self, rows: int, steps: int):
        self.rows, self.steps = rows, steps
        self.step = 0

    def handle(self, event, now_us):
        if isinstance(event, Arrived):
            return [] if event.request < self.rows - 1 else [self._decode()]
        if not isinstance(event, StepDone):
            return []
        out = [Emit(r, event.step, (1,), (0.0,), 8) for r in range(self.rows)]
        if self.step < self.steps:
            return [*out, self._decode()]
        return [*out, *(Finish(r, "length", self.steps) for r in range(self.rows))]

    def _decode(self):
        from loong_jax.types import DecodeRow, Run

        self.step += 1
        rows = tuple(DecodeRow(r, r, 1, -1, r % 8, 0, Run(0, 1), Sampling()) for r in range(self.rows))
        return RunDecode(self.step - 1, tuple(range(8)), 8, rows)

    def view(self):
        return View(0, 1, (InstanceView(0, 1, 1, 0, 0, True),), (), frozenset())


class NullExecutor:
    def __init__(self, post):
        self.post = post

    def submit(self, command):
        if isinstance(command, RunDecode):
            self.post(StepDone(command.step))

    def close(self):
        pass


def test_the_loop_costs_little_per_decode_step():
    """50 us of the engine thread for 8 rows, the manager's and the executor's work aside (measured: 5)."""

    async def run():
        rows, steps = 8, 2000

        def cpu_us_per_step() -> float:
            manager, posted = NullManager(rows, steps), []
            events = [Arrived(r, b"", steps, Sampling()) for r in range(rows)]
            start = time.thread_time_ns()
            for event in events:
                for command in manager.handle(event, 0):
                    posted.append(command)
            while posted:
                command = posted.pop()
                if isinstance(command, RunDecode):
                    posted += manager.handle(StepDone(command.step), 0)
            return (time.thread_time_ns() - start) / 1000 / steps

        alone_us = min(cpu_us_per_step() for _ in range(3))
        costs = []
        for _ in range(3):
            state = new_state()
            loop = EngineLoop(NullManager(rows, steps), state)
            loop.start(NullExecutor(loop.post), (), asyncio.get_running_loop())
            sinks = [ListSink() for _ in range(rows)]
            for sink in sinks:
                loop.arrive(b"", steps, Sampling(), (), sink)
            for sink in sinks:
                await asyncio.wait_for(sink.done.wait(), 30)
            answer = await asyncio.wrap_future(loop.ask_state())
            assert answer.counters.steps_decode == steps
            costs.append(answer.counters.engine_cpu_us / steps)
            await asyncio.to_thread(loop.close)
        assert min(costs) - alone_us < 50, (costs, alone_us)
        print(f"loop {min(costs) - alone_us:.1f} us a step beside {alone_us:.1f} us of the test's manager")

    asyncio.run(run())
