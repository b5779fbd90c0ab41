"""None, one and several observers are told the same."""

from loong_jax.types import FinishReason
from serving.errors import QueueFull
from serving.observers import Observers
from serving.proto.loong.v1 import loong_pb2 as pb


class Told:
    def __init__(self):
        self.calls = []

    def stream(self, request, arrived_us, num_prompt_tokens):
        self.calls.append(("stream", arrived_us, num_prompt_tokens))
        return self

    def refused(self, refusal):
        self.calls.append(("refused", str(refusal)))

    def prefilled(self, now_us):
        self.calls.append(("prefilled", now_us))

    def emitted(self, num_tokens, now_us):
        self.calls.append(("emitted", num_tokens, now_us))

    def ended(self, reason, num_tokens):
        self.calls.append(("ended", reason, num_tokens))


def play(observers):
    stream = observers.stream(pb.GenerateRequest(), 7, 3)
    if stream is not None:
        stream.prefilled(8)
        stream.emitted(2, 9)
        stream.ended(FinishReason.STOP, 2)
    observers.refused(QueueFull("full"))


def test_all_are_told_alike():
    observers = Observers()
    assert observers.stream(pb.GenerateRequest(), 7, 3) is None
    one, other = Told(), Told()
    observers.add(one)
    play(observers)
    alone, one.calls = one.calls, []
    observers.add(other)
    play(observers)
    assert one.calls == other.calls == alone
    assert [call[0] for call in alone] == ["stream", "prefilled", "emitted", "ended", "refused"]
