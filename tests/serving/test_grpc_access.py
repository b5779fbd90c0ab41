"""Keys and TLS through a socket: every gRPC method but health's asks for a key; certificates both ways."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.access import AccessConfig
from serving.client import ClientIdentity, LoongClient, generate_request
from serving.keys import KeyLimits
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.server import OPERATOR_METHODS, SERVICE
from tests.support.certificates import make_certificates
from tests.support.fake_engine import echo
from tests.support.live_server import eventually, live_server

ALICE, BOB = "alice-0123456789", "bob-0123456789abc"
PROMPT = [5, 6, 7]
METHODS = pb.DESCRIPTOR.services_by_name["Loong"].methods


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\nbob {BOB} operator\n")
    return path


def call(channel: grpc.aio.Channel, method, metadata=()):
    """Any method of loong.v1, with an empty request."""
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    return kind(f"/{SERVICE}/{method.name}", response_deserializer=lambda data: data)(b"", metadata=metadata)


async def code_of(call) -> grpc.StatusCode:
    """Of a call that ends by itself; OK also for the first message of a stream."""
    try:
        await (call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read())
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def refusal(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_every_method_but_health_needs_a_key(keys):
    async def run():
        identity = ClientIdentity(api_key=ALICE)
        async with live_server(access=AccessConfig(keys=keys), identity=identity) as live:
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=4))).token_ids == echo(PROMPT, 4)
            assert (await live.client.state()).ready
            async with LoongClient(live.client.target) as nobody:
                channel = nobody._channel
                assert await nobody.is_ready(), "who probes has no key"
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                for wrong in ((), (("authorization", "Bearer wrong-0123456789"),), (("authorization", ALICE),)):
                    for method in METHODS:
                        assert await code_of(call(channel, method, wrong)) is grpc.StatusCode.UNAUTHENTICATED
                error = await refusal(nobody.generate(generate_request(PROMPT, max_tokens=4)))
                assert error.details() == "authorization: 'Bearer KEY' is needed"
                listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await listing.read()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            listing = reflection_pb2_grpc.ServerReflectionStub(live.client._channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                metadata=identity.metadata,
            )
            names = {service.name for service in (await listing.read()).list_services_response.service}
            assert SERVICE in names

    asyncio.run(run())


def test_what_concerns_everybody_needs_an_operators_key(keys):
    async def run():
        async with live_server(access=AccessConfig(keys=keys)) as live:
            for method in METHODS:
                if f"/{SERVICE}/{method.name}" in OPERATOR_METHODS:
                    metadata = (("authorization", f"Bearer {ALICE}"),)
                    code = await code_of(call(live.client._channel, method, metadata))
                    assert code is grpc.StatusCode.PERMISSION_DENIED, method.name

    asyncio.run(run())


def test_limits_of_a_key_and_that_an_ended_call_gives_its_place_back(keys):
    async def run():
        config = AccessConfig(keys=keys, limits=KeyLimits(streams=2))
        identity = ClientIdentity(api_key=ALICE)
        async with live_server(access=config, identity=identity, step_s=0.002) as live:
            long = generate_request(PROMPT, max_tokens=2000)
            calls = [live.client.stub.Generate(long, metadata=identity.metadata) for _ in range(2)]
            for each in calls:
                await each.read()
            error = await refusal(live.client.generate(generate_request(PROMPT, max_tokens=1)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details().startswith("key-streams: alice has 2")
            assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            async with LoongClient(live.client.target, identity=ClientIdentity(api_key=BOB)) as bob:
                assert (await bob.generate(generate_request(PROMPT, max_tokens=1))).token_ids == [5]
            for each in calls:
                each.cancel()
            await eventually(lambda: not live.manager.running)
            for _ in range(5):
                assert (await live.client.generate(generate_request(PROMPT, max_tokens=2))).token_ids == [5, 6]

    asyncio.run(run())


def test_a_name_of_a_request_is_its_keys(keys):
    async def run():
        access = AccessConfig(keys=keys)
        async with live_server(access=access, identity=ClientIdentity(api_key=ALICE), step_s=0.002) as live:
            long = generate_request(PROMPT, max_tokens=2000, request_id="mine")
            stub, alice = live.client.stub, (("authorization", f"Bearer {ALICE}"),)
            call = stub.Generate(long, metadata=alice)
            await call.read()
            async with LoongClient(live.client.target, identity=ClientIdentity(api_key=BOB)) as bob:
                error = await refusal(bob.abort("mine"))
                assert error.code() is grpc.StatusCode.NOT_FOUND
                assert error.details() == (await refusal(bob.abort("never"))).details().replace("never", "mine")
                same = generate_request(PROMPT, max_tokens=2, request_id="mine")
                assert (await bob.generate(same)).token_ids == [5, 6], "and learns nothing of another's"
            assert len(live.manager.running) == 1
            error = await refusal(live.client.generate(generate_request(PROMPT, max_tokens=1, request_id="mine")))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            await live.client.abort("mine")
            while (message := await call.read()) is not grpc.aio.EOF:
                last = message
            assert last.finished.finish_reason == pb.FINISH_REASON_ABORT

    asyncio.run(run())


def test_the_rate_of_a_key(keys):
    async def run():
        config = AccessConfig(keys=keys, limits=KeyLimits(requests_per_s=3))
        async with live_server(access=config, identity=ClientIdentity(api_key=ALICE)) as live:
            answers = await asyncio.gather(*(live.client.state() for _ in range(30)), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert 20 <= len(refused) <= 27
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}

    asyncio.run(run())


def test_tls_and_certificates_of_clients(tmp_path):
    made = make_certificates(tmp_path)

    async def run():
        async with live_server(access=made.config(), identity=made.identity()) as live:
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=4))).token_ids == echo(PROMPT, 4)
            async with LoongClient(live.client.target) as plain:
                assert not await plain.is_ready(1)
            async with LoongClient(live.client.target, identity=ClientIdentity(tls=True)) as untrusting:
                assert not await untrusting.is_ready(1)
        mutual = made.config(asks_clients=True)
        async with live_server(access=mutual, identity=made.identity(with_cert=True)) as live:
            assert (await live.client.generate(generate_request(PROMPT, max_tokens=4))).token_ids == echo(PROMPT, 4)
            stranger = ClientIdentity(tls_ca=made.ca, tls_cert=made.stranger_cert, tls_key=made.stranger_key)
            for identity in (made.identity(), stranger):
                async with LoongClient(live.client.target, identity=identity) as client:
                    assert not await client.is_ready(1)

    asyncio.run(run())


def test_a_renewed_certificate_is_taken_by_the_next_connection(tmp_path):
    made = make_certificates(tmp_path)
    other = make_certificates((tmp_path / "other").mkdir() or tmp_path / "other")

    async def run():
        async with live_server(access=made.config(), identity=made.identity()) as live:
            for source, target in ((other.server_cert, made.server_cert), (other.server_key, made.server_key)):
                target.write_bytes(source.read_bytes())
            async with LoongClient(live.client.target, identity=other.identity()) as client:
                assert await client.is_ready(5)
            assert await live.client.is_ready(5), "connections from before go on"

    asyncio.run(run())


def test_keys_over_tls(tmp_path, keys):
    made = make_certificates(tmp_path)

    async def run():
        config = made.config(keys=keys)
        async with live_server(access=config, identity=made.identity(api_key=ALICE)) as live:
            assert (await live.client.state()).ready
            async with LoongClient(live.client.target, identity=made.identity()) as nobody:
                assert (await refusal(nobody.state())).code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())
