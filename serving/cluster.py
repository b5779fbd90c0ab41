"""The leader's side of an engine of several processes (DESIGN 5, "Many hosts").

Every process performs the same commands in the same order; here they are numbered, encoded once and sent to all
workers, and the completions of all processes become one stream of events. What it is not: the worker
(`serving/worker.py`), placement, or restart. The control port has no authentication: bind it to a private network.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

import loong_jax
from loong_jax import codec
from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    CopyPages,
    InstanceLost,
    Migrate,
    Program,
    ProgramReady,
    RunDecode,
    RunPrefill,
    StepDone,
    StepFailed,
)
from serving.loop import ExecutorLike
from serving.proto.loong.control.v1 import control_pb2 as pb
from serving.proto.loong.control.v1 import control_pb2_grpc

_MAX_BATCH = 64
_REMEMBERED_FAILURES = 1024


class CompletionMerger:
    """One stream of events from all processes. `owners[i]`: the process of instance i."""

    def __init__(self, owners: Sequence[int], post: Callable[[AnyEvent], None]) -> None:
        self._owners = tuple(owners)
        self._post = post
        self._lock = threading.Lock()
        self._open: dict[int, tuple[int, ...]] = {}  # step -> its instances; the owner of the first reports its end
        self._failed: deque[int] = deque(maxlen=_REMEMBERED_FAILURES)
        self._ready: dict[tuple[Program, tuple[int, ...]], set[int]] = {}
        self._gone: set[int] = set()

    def know(self, owners: Sequence[int]) -> None:
        """Owners as the devices of all processes say, before any process has loaded."""
        self._owners = tuple(owners)

    def issued(self, command: AnyCommand) -> None:
        """Before a command is sent anywhere. A step that a lost process would have to report has failed."""
        if isinstance(command, RunPrefill | RunDecode | Migrate):
            instances = command.instances
        elif isinstance(command, CopyPages):
            instances = (command.instance,)
        else:
            return
        with self._lock:
            self._open[command.step] = instances
            if self._speaker(command.step) in self._gone:
                self._fail(command.step)

    def take(self, process: int, event: AnyEvent) -> None:
        """An event of a process's executor; from any thread."""
        with self._lock:
            if self._counts(process, event):
                self._post(event)

    def lost(self, process: int) -> None:
        """A process is gone for good, and its instances with it."""
        with self._lock:
            if process in self._gone:
                return
            self._gone.add(process)
            for step in [step for step in self._open if self._speaker(step) == process]:
                self._fail(step)
            for instance, owner in enumerate(self._owners):
                if owner == process:
                    self._post(InstanceLost(instance))

    def _speaker(self, step: int) -> int | None:
        """The process that reports the end of an open step: all members of a group know its tokens."""
        return self._owners[self._open[step][0]] if step in self._open else None

    def _fail(self, step: int) -> None:
        instances = self._open.pop(step)
        self._failed.append(step)
        self._post(StepFailed(step, instances, f"process {self._owners[instances[0]]} was lost"))

    def _counts(self, process: int, event: AnyEvent) -> bool:
        if process in self._gone:
            return False
        if isinstance(event, StepDone):
            if self._speaker(event.step) != process:
                return False
            del self._open[event.step]
        elif isinstance(event, StepFailed):
            # Every member reports the failure; after the first, pools are made anew.
            if event.step in self._failed:
                return False
            self._failed.append(event.step)
            self._open.pop(event.step, None)
        elif isinstance(event, ProgramReady):
            # A program may run when all members of the group have it.
            ready = self._ready.setdefault((event.program, event.instances), set())
            ready.add(process)
            return ready >= {self._owners[instance] for instance in event.instances} - self._gone
        return True


class _Worker:
    """What is to be sent to one joined worker."""

    def __init__(self) -> None:
        self.commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.ready = threading.Event()
        self.gone = threading.Event()


class ControlServer(control_pb2_grpc.ControlServicer):
    """Serves the control stream to processes 1 to `num_processes - 1`, in threads of its own: decode steps do not wait
    behind client streams."""

    def __init__(self, config: bytes, num_processes: int, merger: CompletionMerger) -> None:
        self._config = config
        self._merger = merger
        self._workers = {process: _Worker() for process in range(1, num_processes)}
        self._joined: set[int] = set()
        self._lock = threading.Lock()
        self._server = grpc.server(
            ThreadPoolExecutor(2 * num_processes, thread_name_prefix="loong-control"),
            options=(
                ("grpc.max_receive_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # workers ping every 30 s, also while idle
            ),
        )
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)

    def start(self, address: str) -> int:
        """Listen; returns the port. Raises RuntimeError when the address is taken."""
        port = self._server.add_insecure_port(address)
        self._server.start()
        return port

    def wait_ready(self, timeout_s: float) -> None:
        """Return once every worker can perform commands. Raises TimeoutError or ConnectionError naming one that
        cannot."""
        deadline_s = time.monotonic() + timeout_s
        for process, worker in self._workers.items():
            while not worker.ready.wait(0.1):
                if worker.gone.is_set():
                    raise ConnectionError(f"process {process} was lost before it was ready")
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"process {process} has not become ready within {timeout_s:g} s")

    def broadcast(self, command: bytes) -> None:
        """Send a command to all workers; one caller, whose order is the order everywhere."""
        for worker in self._workers.values():
            worker.commands.put(command)

    def close(self) -> None:
        """End all streams after what has been sent, and stop listening."""
        for worker in self._workers.values():
            worker.commands.put(None)
        self._server.stop(5).wait()

    def Join(
        self, request_iterator: Iterator[pb.WorkerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.LeaderMessage]:
        process = self._admit(next(request_iterator).hello, context)
        worker = self._workers[process]
        reader = threading.Thread(
            target=self._read, args=(process, request_iterator), name=f"loong-worker-{process}", daemon=True
        )
        reader.start()
        yield pb.LeaderMessage(welcome=pb.Welcome(config=self._config))
        yield from self._commands(worker)

    def _admit(self, hello: pb.Hello, context: grpc.ServicerContext) -> int:
        process = hello.process_id
        if hello.version != loong_jax.__version__:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"version: the worker has {hello.version}, the leader {loong_jax.__version__}",
            )
        with self._lock:
            if process not in self._workers:
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"process_id: {process} is not within 1 to {len(self._workers)}"
                )
            if process in self._joined:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"process_id: {process} has joined before")
            self._joined.add(process)
        return process

    def _read(self, process: int, messages: Iterator[pb.WorkerMessage]) -> None:
        try:
            for message in messages:
                if message.WhichOneof("message") == "ready":
                    self._workers[process].ready.set()
                else:
                    self._merger.take(process, codec.decode_event(message.event))
        except grpc.RpcError:
            pass  # the call ended: below
        finally:
            self._workers[process].gone.set()
            self._workers[process].commands.put(None)
            self._merger.lost(process)

    def _commands(self, worker: _Worker) -> Iterator[pb.LeaderMessage]:
        sequence = 0
        while True:
            batch = [worker.commands.get()]
            while len(batch) < _MAX_BATCH and batch[-1] is not None and not worker.commands.empty():
                batch.append(worker.commands.get())
            commands = [command for command in batch if command is not None]
            if commands:
                yield pb.LeaderMessage(commands=pb.Commands(first_sequence=sequence, commands=commands))
                sequence += len(commands)
            if batch[-1] is None:
                return


class FanOutExecutor:
    """The executor of an engine of several processes: forwards each command to the local one and to all workers."""

    def __init__(self, local: ExecutorLike, merger: CompletionMerger, control: ControlServer) -> None:
        self._local = local
        self._merger = merger
        self._control = control

    def submit(self, command: AnyCommand) -> None:
        self._merger.issued(command)
        self._control.broadcast(codec.encode_command(command))
        self._local.submit(command)

    def close(self) -> None:
        self._control.close()
        self._local.close()
