"""A line for each request that ends, and each refusal, by a live server."""

import asyncio
import logging

import grpc
import pytest

from serving.client import generate_request
from serving.request_log import RequestLog
from tests.support.live_server import live_server


class Lines:
    def __init__(self):
        self.told = []

    def tell(self, level, event, **fields):
        self.told.append((level, event, fields))


def test_ends_and_refusals_carry_their_request():
    lines = Lines()

    async def play():
        async with live_server() as live:
            live.server.generator.observers.add(RequestLog(live.loop.now_us, lines))
            await live.client.generate(generate_request([5, 6], max_tokens=3, request_id="mine"))
            with pytest.raises(grpc.RpcError):
                await live.client.generate(generate_request([5], max_tokens=-1))

    asyncio.run(play())
    (level, event, ended), (worse, what, refused) = lines.told
    assert (level, event, worse, what) == (logging.INFO, "ended", logging.WARNING, "refused")
    assert (ended["request_id"], ended["reason"], ended["prompt_tokens"], ended["tokens"]) == ("mine", "length", 2, 3)
    assert 0 <= ended["queue_s"] <= ended["ttft_s"] <= ended["total_s"]
    assert (refused["request_id"], refused["code"]) == (None, "INVALID_ARGUMENT")
    assert refused["message"].startswith("max_tokens: ")
