"""A worker against a leader that does not keep to the protocol, or is not there. The rest is in test_cluster.py."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from loong_jax import codec
from loong_jax.types import Free
from serving.proto.loong.control.v1 import control_pb2 as pb
from serving.proto.loong.control.v1 import control_pb2_grpc
from serving.worker import ControlError, run_worker

COMMAND = codec.encode_command(Free(0, (0,)))


class Executor:
    def __init__(self):
        self.commands, self.closed = [], False

    def submit(self, command):
        self.commands.append(command)

    def close(self):
        self.closed = True


class Leader(control_pb2_grpc.ControlServicer):
    def __init__(self, messages):
        self.messages = messages

    def Join(self, request_iterator, context):
        yield from self.messages


def serve(*messages) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(2))
    control_pb2_grpc.add_ControlServicer_to_server(Leader(messages), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def commands(first_sequence: int, count: int) -> pb.LeaderMessage:
    return pb.LeaderMessage(commands=pb.Commands(first_sequence=first_sequence, commands=[COMMAND] * count))


WELCOME = pb.LeaderMessage(welcome=pb.Welcome(config=b"c"))


def test_a_gap_in_the_sequence_ends_the_worker():
    executor = Executor()
    server, address = serve(WELCOME, commands(0, 2), commands(3, 1))
    with pytest.raises(ControlError, match="command 2 is missing"):
        run_worker(address, 1, lambda config, post: executor)
    assert executor.commands == [Free(0, (0,))] * 2
    assert executor.closed
    server.stop(None)


def test_the_stream_must_begin_with_a_welcome():
    server, address = serve(commands(0, 1))
    with pytest.raises(ControlError, match="welcome"):
        run_worker(address, 1, lambda config, post: Executor())
    server.stop(None)


def test_the_end_of_the_stream_is_the_end_of_the_worker():
    executor = Executor()
    server, address = serve(WELCOME, commands(0, 1))
    run_worker(address, 1, lambda config, post: executor)
    assert executor.closed
    server.stop(None)


def test_nobody_listens():
    with pytest.raises(grpc.FutureTimeoutError):
        run_worker("127.0.0.1:1", 1, lambda config, post: Executor(), join_timeout_s=0.3)
