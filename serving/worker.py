"""A worker process of an engine of several: receives the leader's commands, in order, and performs them.

The executor is the same as the leader's; this is the wire around it. What it is not: a place where anything is
decided, or restarted: when the leader is gone, the worker ends.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import grpc

import loong_jax
from loong_jax import codec
from loong_jax.types import AnyEvent
from serving.loop import ExecutorLike
from serving.proto.loong.control.v1 import control_pb2 as pb
from serving.proto.loong.control.v1 import control_pb2_grpc

Build = Callable[[bytes, Callable[[AnyEvent], None]], ExecutorLike]
"""From the leader's configuration and a `post` to an executor that is ready for commands."""


class ControlError(Exception):
    """The leader does not keep to the protocol."""


def run_worker(leader: str, process_id: int, build: Build, *, join_timeout_s: float = 60.0) -> None:
    """Join the leader at `leader`, and perform its commands until it ends the stream.

    Raises grpc.RpcError when the leader refuses or is lost, ControlError when a command is missing, and whatever
    `build` and the executor raise.
    """
    outgoing: queue.SimpleQueue[pb.WorkerMessage | None] = queue.SimpleQueue()
    outgoing.put(pb.WorkerMessage(hello=pb.Hello(process_id=process_id, version=loong_jax.__version__)))
    options = (("grpc.max_receive_message_length", -1), ("grpc.keepalive_time_ms", 30_000))
    with grpc.insecure_channel(leader, options=options) as channel:
        grpc.channel_ready_future(channel).result(join_timeout_s)
        call = control_pb2_grpc.ControlStub(channel).Join(iter(outgoing.get, None))
        try:
            _perform(call, outgoing, build)
        finally:
            outgoing.put(None)
            call.cancel()


def _perform(
    incoming: Iterator[pb.LeaderMessage], outgoing: queue.SimpleQueue[pb.WorkerMessage | None], build: Build
) -> None:
    welcome = next(incoming)
    if welcome.WhichOneof("message") != "welcome":
        raise ControlError("the first message is no welcome")
    executor = build(
        welcome.welcome.config, lambda event: outgoing.put(pb.WorkerMessage(event=codec.encode_event(event)))
    )
    try:
        outgoing.put(pb.WorkerMessage(ready=pb.Ready()))
        sequence = 0
        for message in incoming:
            if message.commands.first_sequence != sequence:
                raise ControlError(f"command {sequence} is missing: {message.commands.first_sequence} came")
            for command in message.commands.commands:
                executor.submit(codec.decode_command(command))
            sequence += len(message.commands.commands)
    finally:
        executor.close()
