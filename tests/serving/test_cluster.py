"""Leader and workers over a real control stream, with executors that only record."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from loong_jax.types import (
    ContextForm,
    CopyPages,
    Free,
    InstanceLost,
    Migrate,
    Phase,
    Program,
    ProgramReady,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
)
from serving.cluster import CompletionMerger, ControlServer, FanOutExecutor
from serving.worker import run_worker
from tests.support.fake_engine import FakeExecutor

OWNERS = (0, 0, 1, 1)
PROGRAM = Program(Phase.DECODE, 2, 8)


def decode(step: int, *instances: int) -> RunDecode:
    return RunDecode(step, instances, 8, ())


class Recorder:
    """An executor that notes commands, and completes steps the way a real one does: each process speaks."""

    def __init__(self, post):
        self.post, self.commands, self.closed = post, [], threading.Event()

    def submit(self, command):
        self.commands.append(command)
        if isinstance(command, RunDecode):
            self.post(StepDone(command.step, (7,), (0.5,)))

    def close(self):
        self.closed.set()


def merger() -> tuple[CompletionMerger, list]:
    events = []
    return CompletionMerger(OWNERS, events.append), events


def test_a_step_is_told_by_the_owner_of_its_first_instance():
    merged, events = merger()
    for command in (
        decode(0, 1, 2),
        RunPrefill(1, (2, 3), 16, ContextForm.RING, ()),
        Migrate(2, (0, 3), ()),
        CopyPages(3, 2, ()),
        Free(0, (1,)),
    ):
        merged.issued(command)
    for step, owner in enumerate((0, 1, 0, 1)):
        merged.take(1 - owner, StepDone(step))
        assert events == []
        merged.take(owner, StepDone(step))
        merged.take(owner, StepDone(step))
        assert events == [StepDone(step)]
        events.clear()


def test_a_failure_is_told_once_whoever_notices_it():
    merged, events = merger()
    merged.issued(decode(0, 1, 2))
    merged.issued(decode(1, 1, 2))
    merged.take(0, StepDone(0))
    late = StepFailed(0, (1, 2), "seen later by the other process")
    merged.take(1, late)
    failed = StepFailed(1, (1, 2), "x")
    merged.take(1, failed)
    merged.take(0, failed)
    merged.take(0, StepDone(1))
    assert events == [StepDone(0), late, failed]


def test_a_program_is_ready_when_all_members_have_it():
    merged, events = merger()
    both, one = ProgramReady(PROGRAM, (1, 2)), ProgramReady(PROGRAM, (2, 3))
    merged.take(0, both)
    merged.take(1, one)
    assert events == [one]
    merged.take(1, both)
    assert events == [one, both]


def test_a_lost_process_takes_its_instances_and_its_steps_along():
    merged, events = merger()
    merged.issued(decode(0, 2, 3))  # process 1 would tell
    merged.issued(decode(1, 1, 2))  # process 0 will, whatever comes of it
    merged.lost(1)
    merged.lost(1)
    merged.take(1, StepDone(0))
    assert events == [StepFailed(0, (2, 3), "process 1 was lost"), InstanceLost(2), InstanceLost(3)]
    merged.take(0, StepFailed(1, (1, 2), "gloo"))
    assert events[3:] == [StepFailed(1, (1, 2), "gloo")]
    merged.issued(decode(2, 3))  # on its way before the engine knew
    assert events[4:] == [StepFailed(2, (3,), "process 1 was lost")]


def test_owners_are_those_that_the_devices_tell():
    merged, events = merger()
    merged.know((0, 1, 1, 0))
    merged.issued(decode(0, 3))
    merged.take(1, StepDone(0))
    assert events == []
    merged.take(0, StepDone(0))
    merged.lost(1)
    assert events == [StepDone(0), InstanceLost(1), InstanceLost(2)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def start(num_processes: int = 2):
    events = queue.SimpleQueue()
    merged = CompletionMerger(OWNERS if num_processes == 2 else (0, 1, 2), events.put)
    control = ControlServer(b"the config", num_processes, merged)
    return events, merged, control, f"127.0.0.1:{control.start('127.0.0.1:0')}"


def test_workers_get_one_order_and_their_tokens_come_back(pool):
    events, merged, control, address = start(3)
    workers, configs = {}, []

    def build(process):
        def make(config, post):
            configs.append(config)
            workers[process] = Recorder(post)
            return workers[process]

        return make

    done = [pool.submit(run_worker, address, process, build(process)) for process in (1, 2)]
    control.wait_ready(10)
    local = Recorder(lambda event: merged.take(0, event))
    executor = FanOutExecutor(local, merged, control)
    commands = [decode(step, step % 3) if step % 2 else Free(step, (step % 3,)) for step in range(500)]
    for command in commands:
        executor.submit(command)
    steps = [command.step for command in commands if isinstance(command, RunDecode)]
    seen = [events.get(timeout=60) for _ in steps]
    assert sorted(event.step for event in seen) == steps
    assert all(event.tokens == (7,) for event in seen)
    executor.close()
    for future in done:
        future.result(10)
    assert configs == [b"the config"] * 2
    assert local.commands == workers[1].commands == workers[2].commands == commands
    assert all(recorder.closed.is_set() for recorder in (local, *workers.values()))


def test_a_worker_that_fails_to_build_is_lost_and_named(pool):
    events, _, control, address = start()

    def build(config, post):
        raise ValueError("no such checkpoint")

    done = pool.submit(run_worker, address, 1, build)
    with pytest.raises(ValueError, match="no such checkpoint"):
        done.result(10)
    assert {events.get(timeout=60), events.get(timeout=60)} == {InstanceLost(2), InstanceLost(3)}
    with pytest.raises(ConnectionError, match="process 1 was lost"):
        control.wait_ready(10)
    control.close()


def test_a_worker_that_never_comes_is_named():
    _, _, control, _ = start()
    with pytest.raises(TimeoutError, match="process 1 has not become ready"):
        control.wait_ready(0.2)
    control.close()


@pytest.mark.parametrize(
    ("process", "code"), [(0, grpc.StatusCode.INVALID_ARGUMENT), (2, grpc.StatusCode.INVALID_ARGUMENT)]
)
def test_a_process_id_out_of_range_is_refused(process, code):
    _, _, control, address = start()
    with pytest.raises(grpc.RpcError) as error:
        run_worker(address, process, lambda config, post: None)
    assert error.value.code() is code
    assert "process_id" in error.value.details()
    control.close()


def test_a_second_worker_of_the_same_id_is_refused(pool):
    _, _, control, address = start()
    done = pool.submit(run_worker, address, 1, lambda config, post: Recorder(post))
    control.wait_ready(10)
    with pytest.raises(grpc.RpcError) as error:
        run_worker(address, 1, lambda config, post: Recorder(post))
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    control.close()
    done.result(10)


def test_another_version_is_refused(monkeypatch):
    import loong_jax

    _, _, control, address = start()
    monkeypatch.setattr("serving.worker.loong_jax", type(loong_jax)("other"))
    monkeypatch.setattr("serving.worker.loong_jax.__version__", "0.0.0", raising=False)
    with pytest.raises(grpc.RpcError) as error:
        run_worker(address, 1, lambda config, post: Recorder(post))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "0.0.0" in error.value.details()
    control.close()


def test_a_whole_engine_with_a_worker_generates(pool):
    """The fake engine's tokens, computed by the process that owns instance 0 or, for others, by the worker."""
    import asyncio

    from loong_jax.types import Emit, Finish, Sampling
    from serving.loop import EngineLoop
    from serving.state import EngineState
    from tests.support.fake_engine import FakeManager, echo

    class Sink:
        def __init__(self):
            self.tokens, self.done = [], asyncio.Event()

        def put(self, item, now_us):
            if isinstance(item, Emit):
                self.tokens += item.tokens
            elif isinstance(item, Finish):
                self.done.set()

    async def run(first_owner: int):
        state = EngineState(kv_token_bytes=1, compiles_after_ready=lambda: 0)
        loop = EngineLoop(FakeManager(), state)
        owners = (first_owner, 1 - first_owner, 0, 1)
        merged = CompletionMerger(owners, loop.post)
        control = ControlServer(b"", 2, merged)
        address = f"127.0.0.1:{control.start('127.0.0.1:0')}"
        worker = pool.submit(run_worker, address, 1, lambda config, post: FakeExecutor(post))
        await asyncio.to_thread(control.wait_ready, 10)
        local = FakeExecutor(lambda event: merged.take(0, event))
        loop.start(FanOutExecutor(local, merged, control), (), asyncio.get_running_loop())
        sink = Sink()
        loop.arrive(b"".join(t.to_bytes(4, "little") for t in (4, 5, 6)), 50, Sampling(), (), sink)
        await asyncio.wait_for(sink.done.wait(), 60)
        assert sink.tokens == echo([4, 5, 6], 50)
        await asyncio.to_thread(loop.close)
        worker.result(10)

    for first_owner in (0, 1):
        asyncio.run(run(first_owner))
