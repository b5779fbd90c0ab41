"""The typed client: the message it builds, and that leaving early cancels. All else is in test_server.py."""

import asyncio
import contextlib

import pytest

from serving.client import generate_request
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.live_server import eventually, live_server


def test_absent_stays_absent():
    request = generate_request("text")
    assert request == pb.GenerateRequest(text="text", sampling=pb.SamplingParams())
    for field in ("max_tokens", "request_id"):
        assert not request.HasField(field)
    assert not any(request.sampling.HasField(field) for field in ("temperature", "top_k", "top_p", "seed"))


def test_everything_given_arrives():
    request = generate_request(
        [1, 2],
        max_tokens=0,
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        seed=0,
        stop=["a"],
        stop_token_ids=[3],
        ignore_eos=True,
        request_id="r",
    )
    assert request.WhichOneof("prompt") == "token_ids"
    assert all(request.sampling.HasField(field) for field in ("temperature", "top_k", "top_p", "seed"))
    assert request.HasField("max_tokens")
    assert (list(request.stop), list(request.stop_token_ids)) == (["a"], [3])
    assert (request.ignore_eos, request.request_id) == (True, "r")


def test_the_bounds_of_the_wire_are_python_errors():
    with pytest.raises(ValueError, match="range"):
        generate_request([2**31])
    with pytest.raises(ValueError, match="range"):
        generate_request([1], max_tokens=2**63)


def test_leaving_the_loop_cancels_the_call():
    async def run():
        async with live_server(step_s=0.002) as live:
            request = generate_request([1, 2], max_tokens=2000)
            async with contextlib.aclosing(live.client.responses(request)) as responses:
                async for _ in responses:
                    break
            await eventually(lambda: not live.manager.running)

    asyncio.run(run())
