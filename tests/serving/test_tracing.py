"""Spans as an in-memory exporter gets them: parents, times, attributes, over gRPC and HTTP."""

import asyncio
import sys

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loong_jax.config import ConfigError
from serving.client import generate_request
from serving.tracing import Tracer, otlp_tracer
from tests.support.live_http import live_http

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
HEADERS = (("traceparent", f"00-{TRACE:032x}-{PARENT:016x}-01"),)


def test_a_request_is_part_of_its_callers_trace():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def play():
        async with live_http() as live:
            tracer = Tracer(provider)
            tracer.now_us = live.live.loop.now_us
            live.live.server.generator.observers.add(tracer)
            request = generate_request([5, 6], max_tokens=3, temperature=1.0, request_id="mine")
            async for _ in live.live.client.stub.Generate(request, metadata=HEADERS):
                pass
            body = {"model": "echo", "prompt": [5, 6], "max_tokens": 2}
            answer = await live.http.post("/v1/completions", json=body, headers=dict(HEADERS))
            assert answer.status_code == 200
            await live.live.client.generate(generate_request([5], max_tokens=1))
            with pytest.raises(grpc.RpcError):
                await live.live.client.generate(generate_request([5], max_tokens=-1))

    asyncio.run(play())
    spans = exporter.get_finished_spans()
    over_grpc, over_http, alone, refused = [span for span in spans if span.name == "llm_request"]
    assert over_grpc.attributes["gen_ai.request.id"] == "mine"
    for span in (over_grpc, over_http):
        assert (span.context.trace_id, span.parent.span_id) == (TRACE, PARENT)
    assert alone.parent is None
    assert alone.context.trace_id != TRACE
    assert over_grpc.attributes["gen_ai.usage.prompt_tokens"] == 2
    assert over_grpc.attributes["gen_ai.usage.completion_tokens"] == 3
    assert over_grpc.attributes["gen_ai.request.temperature"] == 1.0
    assert over_grpc.attributes["gen_ai.response.finish_reason"] == "length"
    assert over_grpc.attributes["gen_ai.latency.time_to_first_token"] >= 0
    children = [span for span in spans if span.parent and span.parent.span_id == over_grpc.context.span_id]
    assert [span.name for span in children] == ["queue", "prefill", "decode"]
    assert over_grpc.start_time == children[0].start_time
    for before, after in zip(children, children[1:], strict=False):
        assert before.start_time <= before.end_time == after.start_time
    assert children[-1].end_time == over_grpc.end_time
    assert refused.attributes["loong.refusal"] == "INVALID_ARGUMENT"
    assert not refused.status.is_ok


def test_an_exporter_is_made_and_closed():
    tracer = otlp_tracer("http://127.0.0.1:1")
    tracer.close()
    with pytest.raises(ConfigError, match="otlp-traces-endpoint: 'localhost"):
        otlp_tracer("localhost:4317")


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"loong-jax\[otel\]"):
        otlp_tracer("http://x")
