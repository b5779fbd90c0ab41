"""The live loop: order, coalescing, the event log, the clock, and what it costs."""

import asyncio
import threading

import pytest
from replay import replay

from loong_jax import __version__
from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.eventlog import EventLogWriter, LogHeader, read_event_log
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import (
    Aborted,
    CostUpdated,
    DecodeRow,
    Emit,
    Finish,
    ProgramReady,
    Reject,
    RunDecode,
    RunPrefill,
    Sampling,
    StepDone,
    Tick,
)
from serving.errors import EngineFailed
from serving.loop import EngineLoop
from serving.outbox import Crashed, Prefilled
from serving.state import EngineState
from serving.step_times import StepTimes
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


def test_it_is_full_from_a_refusal_until_somebody_leaves_the_queue():
    async def run():
        manager, sinks = FakeManager(max_waiting=1), [ListSink() for _ in range(4)]
        loop = EngineLoop(manager, new_state())
        executor = FakeExecutor(loop.post)
        executor.running.clear()
        loop.start(executor, (), asyncio.get_running_loop())
        for sink in sinks[:3]:  # one in a step, one waiting, one refused
            loop.arrive(prompt(1), 5, Sampling(), (), sink)
        await asyncio.wait_for(sinks[2].done.wait(), 60)
        assert isinstance(sinks[2].items[-1], Reject)
        assert loop.full == "1 requests wait"
        loop.abort(1)  # the one that waits
        await asyncio.wait_for(sinks[1].done.wait(), 60)
        assert loop.full is None
        loop.arrive(prompt(1), 5, Sampling(), (), sinks[3])
        executor.running.set()
        await asyncio.wait_for(sinks[3].done.wait(), 60)
        assert isinstance(sinks[3].items[-1], Finish)
        await asyncio.to_thread(loop.close)

    asyncio.run(run())


def test_events_are_logged_in_order_with_their_commands_and_sinks_run_in_asyncio():
    async def run():
        log, sink = ListLog(), ListSink()
        loop = EngineLoop(FakeManager(), new_state(), event_log=log)
        loop.start(FakeExecutor(loop.post), (), asyncio.get_running_loop())
        assert loop.arrive(prompt(1, 2), 5, Sampling(), (), sink) == 0
        await asyncio.wait_for(sink.done.wait(), 60)
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
        async with asyncio.timeout(60):
            while sum(isinstance(frame[1], Tick) for frame in log.frames) < 2:
                await asyncio.sleep(0.05)
        loop.abort(request)
        await asyncio.wait_for(sink.done.wait(), 60)
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
        await asyncio.wait_for(sink.done.wait(), 60)
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
        await asyncio.wait_for(sink.done.wait(), 60)
        await asyncio.to_thread(loop.close)

    asyncio.run(run())


def test_the_event_that_breaks_the_manager_is_the_last_in_the_log():
    async def run():
        log, sink, manager, crashes = ListLog(), ListSink(), FakeManager(), []
        loop = EngineLoop(manager, new_state(), event_log=log, on_crash=crashes.append)
        executor = FakeExecutor(loop.post)
        executor.running.clear()
        loop.start(executor, (), asyncio.get_running_loop())
        request = loop.arrive(prompt(1), 3, Sampling(), (), sink)
        await asyncio.wrap_future(loop.ask_state())
        manager.handle = lambda event, now_us: 1 / 0
        loop.abort(request)
        await asyncio.wait_for(sink.done.wait(), 60)
        executor.running.set()
        await asyncio.to_thread(loop.close)
        assert isinstance(sink.items[-1], Crashed)
        assert "ZeroDivisionError" in crashes[0]
        assert isinstance(log.frames[-1][1], Tick | Aborted)
        assert log.frames[-1][2] == ()

    asyncio.run(run())


class StepTaker:
    """An executor whose steps are done at once."""

    def __init__(self, post):
        self._post = post

    def submit(self, command):
        if isinstance(command, RunPrefill | RunDecode):
            rows = [row for row in command.rows if isinstance(row, DecodeRow) or row.emit]
            self._post(StepDone(command.step, (5,) * len(rows), (-0.5,) * len(rows)))

    def close(self):
        pass


def test_the_cost_model_is_refitted_by_events_and_the_log_replays(tmp_path, capsys):
    cluster = ClusterConfig(1, pages_per_instance=64, slots=4, ladder=LadderConfig(dops=(1,), decode_rows=(4,)))
    cost = unmeasured(cluster.ladder)
    header = LogHeader(__version__, cluster, LimitsConfig(), "elastic", dict(cost.coefficients))
    manager = Manager(cluster, header.limits, POLICIES[header.policy](cluster, header.limits), cost)
    times = StepTimes(cost, manager.state.ledger.tokens, 1, refit_us=1)
    state = EngineState(kv_token_bytes=1, compiles_after_ready=lambda: 0, step_times=times)

    async def run():
        loop = EngineLoop(manager, state, event_log=EventLogWriter(tmp_path / "log", header))
        loop.start(StepTaker(loop.post), (), asyncio.get_running_loop())
        for program in cluster.ladder.programs():
            loop.post(ProgramReady(program, (0,)))
        for request in range(40):
            sink = ListSink()
            loop.arrive(prompt(*range(1, 20 + request)), 3, Sampling(), (), sink)
            await asyncio.wait_for(sink.done.wait(), 60)
        told = await asyncio.wrap_future(loop.ask_state())
        assert told.counters.cost_refits == times.num_refits >= 1
        await asyncio.to_thread(loop.close)

    asyncio.run(run())
    _, frames = read_event_log(tmp_path / "log")
    updates = [frame.event for frame in frames if isinstance(frame.event, CostUpdated)]
    assert len(updates) == times.num_refits
    assert manager.cost.coefficients == times.cost.coefficients != cost.coefficients
    assert replay(tmp_path / "log", describe=False) == 0
    assert "all bytes equal" in capsys.readouterr().out
