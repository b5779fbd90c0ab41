"""JetStream's Orchestrator: the wire of its published clients, and the same tokens as loong.v1 gives."""

import asyncio

import grpc
import pytest

from serving.client import LoongClient, generate_request
from serving.proto.jetstream import jetstream_pb2 as jetstream
from serving.proto.jetstream import jetstream_pb2_grpc
from tests.support.byte_tokenizer import BOS, EOS, byte_tokenizer
from tests.support.fake_engine import echo
from tests.support.live_server import live_server

PROMPT = [104, 105]


def tokens(ids, **fields) -> jetstream.DecodeRequest:
    return jetstream.DecodeRequest(token_content=jetstream.DecodeRequest.TokenContent(token_ids=ids), **fields)


def text(content: str, **fields) -> jetstream.DecodeRequest:
    return jetstream.DecodeRequest(text_content=jetstream.DecodeRequest.TextContent(text=content), **fields)


def answers(*requests: jetstream.DecodeRequest) -> list[list[jetstream.DecodeResponse]]:
    async def run():
        async with live_server() as live, grpc.aio.insecure_channel(live.client.target) as channel:
            stub = jetstream_pb2_grpc.OrchestratorStub(channel)
            assert (await stub.HealthCheck(jetstream.HealthCheckRequest())).is_live
            return [[response async for response in stub.Decode(request)] for request in requests]

    return asyncio.run(run())


def samples(responses: list[jetstream.DecodeResponse], index: int = 0) -> tuple[list[int], str]:
    """Token ids and text of one sample, as the published benchmark adds them up."""
    found = [response.stream_content.samples[index] for response in responses]
    return [token for sample in found for token in sample.token_ids], "".join(sample.text for sample in found)


def test_the_wire_is_the_published_one():
    """Field numbers and types, as bytes: 0.2.2 wrote 1, 3, 4, 5, 6; later ones 4 to 10."""
    assert tokens([5, 300], max_tokens=7, session_cache="s", priority=2) == jetstream.DecodeRequest.FromString(
        b"\x0a\x01s\x18\x02\x20\x07\x32\x05\x0a\x03\x05\xac\x02"
    )
    assert text("hi", num_samples=2, lora_adapter_id="l", has_bos=True) == jetstream.DecodeRequest.FromString(
        b"\x2a\x04\x0a\x02hi\x40\x02\x4a\x01l\x50\x01"
    )
    sample = jetstream.DecodeResponse.StreamContent.Sample(text="a", token_ids=[1, 2])
    response = jetstream.DecodeResponse(stream_content=jetstream.DecodeResponse.StreamContent(samples=[sample]))
    assert response.SerializeToString() == b"\x1a\x09\x0a\x07\x0a\x01a\x12\x02\x01\x02"
    assert jetstream.HealthCheckResponse(is_live=True).SerializeToString() == b"\x08\x01"
    assert jetstream.DESCRIPTOR.services_by_name["Orchestrator"].full_name == "jetstream_proto.Orchestrator"


def test_tokens_and_text():
    by_tokens, with_bos, by_text, text_with_bos, default = answers(
        tokens(PROMPT, max_tokens=6),
        tokens(PROMPT, max_tokens=6, has_bos=True, priority=3),
        text("hi", max_tokens=6, metadata=jetstream.DecodeRequest.Metadata(start_time=1.0)),
        text("hi", max_tokens=6, has_bos=True),
        tokens([BOS, *PROMPT]),
    )
    assert samples(by_tokens) == (echo([BOS, *PROMPT], 6), ""), "token input has token output"
    assert samples(with_bos)[0] == echo(PROMPT, 6)
    assert samples(by_text) == (echo([BOS, *PROMPT], 6), byte_tokenizer().decode(echo([BOS, *PROMPT], 6)))
    assert samples(text_with_bos)[0] == echo(PROMPT, 6)
    assert len(samples(default)[0]) == 256, "and no second beginning"


def test_several_samples():
    (responses,) = answers(tokens(PROMPT, max_tokens=5, num_samples=3))
    assert all(len(response.stream_content.samples) == 3 for response in responses)
    assert all(len(samples(responses, index)[0]) == 5 for index in range(3))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (jetstream.DecodeRequest(max_tokens=1), "content"),
        (tokens([], max_tokens=1), "token_ids"),
        (tokens([-1], max_tokens=1), "token_ids"),
        (text("", max_tokens=1), "text"),
        (text("", max_tokens=1, has_bos=True), "text"),
        (tokens(PROMPT, max_tokens=-1), "max_tokens"),
        (tokens(PROMPT, num_samples=-1), "num_samples"),
        (tokens(PROMPT, num_samples=65), "n"),
        (tokens(PROMPT, session_cache="x"), "session_cache"),
        (tokens(PROMPT, lora_adapter_id="x"), "lora_adapter_id"),
    ],
)
def test_what_cannot_be_served_is_named(request_, field):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        answers(request_)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.value.details()).startswith(f"{field}: ")


def test_the_end_of_a_sequence_is_no_token_of_it():
    (responses,) = answers(tokens([104, EOS], max_tokens=8, has_bos=True))
    assert samples(responses)[0] == [104]


def test_not_live_while_warming_up():
    async def run():
        async with live_server(ready=False) as live, grpc.aio.insecure_channel(live.client.target) as channel:
            stub = jetstream_pb2_grpc.OrchestratorStub(channel)
            assert not (await stub.HealthCheck(jetstream.HealthCheckRequest())).is_live
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Decode(tokens(PROMPT, max_tokens=1)).read()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_both_services_share_one_engine():
    async def run():
        async with live_server() as live, grpc.aio.insecure_channel(live.client.target) as channel:
            stub = jetstream_pb2_grpc.OrchestratorStub(channel)
            theirs = [response async for response in stub.Decode(tokens(PROMPT, max_tokens=4, has_bos=True))]
            async with LoongClient(live.client.target) as client:
                ours = await client.generate(generate_request(PROMPT, max_tokens=4), 10)
            assert samples(theirs)[0] == ours.token_ids

    asyncio.run(run())
