"""Loads are what the state says, of living instances."""

from serving.about import Served, loads
from serving.proto.loong.v1 import loong_pb2 as pb


def test_loads():
    state = pb.State(
        requests_running=3,
        requests_waiting=2,
        groups=[
            pb.Group(phase=pb.PHASE_PREFILL, tokens_per_s=100.0),
            pb.Group(phase=pb.PHASE_DECODE, tokens_per_s=7.0),
            pb.Group(phase=pb.PHASE_DECODE, tokens_per_s=8.0),
        ],
        instances=[
            pb.Instance(index=0, pages_used=3, pages_total=10, alive=True),
            pb.Instance(index=1, pages_used=1, pages_total=10, alive=True),
            pb.Instance(index=2, pages_used=0, pages_total=10, alive=False),
        ],
    )
    served = Served("m", max_running=256, max_waiting=1024, page_tokens=16)
    assert loads(served, state, None) == pb.Loads(
        serving=True,
        requests_running=3,
        requests_waiting=2,
        max_running=256,
        max_waiting=1024,
        pool_tokens=320,
        pool_tokens_used=64,
        prefill_tokens_per_s=100.0,
        decode_tokens_per_s=15.0,
    )
    refusing = loads(served, pb.State(), "the server is draining")
    assert (refusing.serving, refusing.not_serving) == (False, "the server is draining")
