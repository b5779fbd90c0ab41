"""Bytes that nobody sends on purpose, for a minute each: over gRPC, over HTTP, and past both protocols. Whatever comes
back, the server goes on, and keeps no request and no page.
"""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time

import grpc
import pytest

from serving.client import generate_request
from tests.serving.test_bounds import BASES, TRIED, answer, base_of, probe
from tests.support.bounds import VALUES, leaves, put
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.fake_engine import FakeManager
from tests.support.live_http import TEMPLATE, LiveHttp, live_http
from tests.support.live_server import eventually
from tests.support.process import ROOT

FUZZ_S = 60.0
BATCH = 40
REFUSED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,  # what the library says to bytes that are no message
    grpc.StatusCode.UNKNOWN,
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, bytes cut out, doubled or made up."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if out:
                out[place % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                del out[place : place + rng.randint(1, 8)]
            case 2:
                out[place:place] = out[place : place + rng.randint(1, 16)]
            case 3:
                out[place:place] = rng.randbytes(rng.randint(1, 12))
            case _:
                out[place:place] = b"\xff" * rng.randint(1, 10)
    return bytes(out)


def fuzzed(one, seconds: float = FUZZ_S) -> None:
    """Call `one(live, rng)` for so long, with the same random numbers each time, and probe after each batch."""

    async def run():
        rng = random.Random(7)
        tokenizer = byte_tokenizer(chat_template=TEMPLATE)
        async with live_http(manager=FakeManager(max_waiting=256), tokenizer=tokenizer) as live:
            end_s, rounds = time.monotonic() + seconds, 0
            while time.monotonic() < end_s:
                for _ in range(BATCH):
                    await one(live, rng)
                await probe(live.live)
                assert (await live.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200
                rounds += 1
            assert rounds
            await eventually(lambda: not live.live.manager.running and not live.live.manager.waiting)
            view = live.live.manager.view()
            assert all(instance.free_pages == instance.num_pages for instance in view.instances)

    asyncio.run(run())


@pytest.mark.slow
def test_messages_that_are_none_over_grpc():
    async def one(live: LiveHttp, rng: random.Random) -> None:
        method = rng.choice(TRIED)
        request = type(base_of(method))()
        request.CopyFrom(BASES.get(method.name, request))
        for _ in range(rng.randrange(4)):
            paths = list(leaves(method.input_type))
            if paths:
                path = rng.choice(paths)
                put(request, path, rng.choice(VALUES[path[-1].cpp_type]))
        code, words = await answer(live.live, method, mutated(request.SerializeToString(), rng))
        assert code in REFUSED, (method.name, code, words)

    fuzzed(one)


@pytest.mark.slow
def test_bodies_that_are_none_over_http():
    bodies = {
        "/v1/completions": {"prompt": "abc", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}, "stream": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "top_p": 0.5},
        "/tokenize": {"prompt": "abc"},
        "/detokenize": {"tokens": [97, 98]},
    }

    async def one(live: LiveHttp, rng: random.Random) -> None:
        path = rng.choice(sorted(bodies))
        body = mutated(json.dumps(bodies[path]).encode(), rng)
        response = await live.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404, 413), (path, body, response.text)

    fuzzed(one)


@pytest.mark.slow
def test_bytes_that_are_no_protocol():
    starts = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n",
    )

    async def one(live: LiveHttp, rng: random.Random) -> None:
        address = rng.choice((live.url.rsplit("/", 1)[1], live.live.client.target))
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(mutated(rng.choice(starts), rng))
            await asyncio.wait_for(reader.read(100), 0.05)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    fuzzed(one)


@pytest.mark.slow
def test_bounds_hold_without_assertions():
    """Under `python -O` the checks of ours that are assertions are gone, and none of them was needed. (Those of tests
    are rewritten by pytest and stay, which the first line makes sure of.)"""
    alone = "import sys; sys.exit(0 if __debug__ else 3)"
    assert subprocess.run([sys.executable, "-O", "-c", alone], check=False).returncode == 3
    files = ("test_bounds.py", "test_validation.py", "http/test_bounds.py", "test_optimized.py")
    command = [sys.executable, "-O", "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/serving/{name}" for name in files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_mutations_differ_and_are_repeatable():
    data = generate_request([5, 6, 7], max_tokens=2).SerializeToString()
    first = [mutated(data, random.Random(seed)) for seed in range(50)]
    assert first == [mutated(data, random.Random(seed)) for seed in range(50)]
    assert len(set(first)) > 40
