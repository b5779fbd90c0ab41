"""Spans of OpenTelemetry: one for each choice of a request, with its wait, prefill and decode as children.

An observer of requests; the caller's `traceparent` makes them part of its trace. Needs the extra `otel`, imported here
alone. Names and attributes are vLLM's (`gen_ai.*`). What it is not: a trace of devices (`serving/device_trace.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import loong_jax
from loong_jax.config import ConfigError
from loong_jax.types import FinishReason
from serving import context
from serving.errors import Refusal
from serving.proto.loong.v1 import loong_pb2 as pb


def otlp_tracer(endpoint: str) -> Tracer:
    """Exports to an OTLP collector over gRPC, in the background; "http://" is plain text. Raises ConfigError where the
    packages are missing or the endpoint is none."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(f"otlp-traces-endpoint: needs {error.name}; pip install 'loong-jax[otel]'") from None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp-traces-endpoint: {endpoint[:200]!r} is no URL such as http://localhost:4317")
    provider = TracerProvider(resource=Resource.create({"service.name": "loong"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


class Tracer:
    """`now_us`: the engine's clock, set when there is an engine. `provider` is OpenTelemetry's."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loong", loong_jax.__version__)
        self.now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000

    def stream(self, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int) -> _Stream:
        # Times are the engine's; what they are by the clock on the wall is asked once.
        wall_ns = time.time_ns() - 1000 * (self.now_us() - arrived_us)
        return _Stream(self._tracer, self.now_us, request, arrived_us, wall_ns, num_prompt_tokens)

    def refused(self, refusal: Refusal) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = _start(self._tracer, None)
        span.set_attribute("loong.refusal", refusal.code.name)
        span.set_status(Status(StatusCode.ERROR, str(refusal)[:500]))
        span.end()

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _start(tracer: Any, start_ns: int | None) -> Any:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(dict(context.trace_headers.get()))
    span = tracer.start_span("llm_request", context=parent, kind=SpanKind.SERVER, start_time=start_ns)
    span.set_attribute("gen_ai.request.id", context.request_id.get())
    return span


class _Stream:
    def __init__(
        self,
        tracer: Any,
        now_us: Callable[[], int],
        request: pb.GenerateRequest,
        arrived_us: int,
        wall_ns: int,
        num_prompt_tokens: int,
    ) -> None:
        self._tracer, self._now_us = tracer, now_us
        self._arrived_us, self._wall_ns = arrived_us, wall_ns
        self._started_us = self._first_us = 0
        self._span = _start(tracer, wall_ns)
        self._span.set_attribute("gen_ai.usage.prompt_tokens", num_prompt_tokens)
        if request.HasField("max_tokens"):
            self._span.set_attribute("gen_ai.request.max_tokens", request.max_tokens)
        if request.sampling.HasField("temperature"):
            self._span.set_attribute("gen_ai.request.temperature", request.sampling.temperature)

    def prefilled(self, now_us: int) -> None:
        self._started_us = self._started_us or now_us

    def emitted(self, num_tokens: int, now_us: int) -> None:
        self._first_us = self._first_us or now_us

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        end_us = self._now_us()
        started_us, first_us = self._started_us or end_us, self._first_us or end_us
        self._child("queue", self._arrived_us, started_us)
        if self._started_us:
            self._child("prefill", started_us, first_us)
        if self._first_us:
            self._child("decode", first_us, end_us)
            self._span.set_attribute("gen_ai.latency.time_to_first_token", (first_us - self._arrived_us) / 1e6)
        self._span.set_attribute("gen_ai.latency.time_in_queue", (started_us - self._arrived_us) / 1e6)
        self._span.set_attribute("gen_ai.latency.e2e", (end_us - self._arrived_us) / 1e6)
        self._span.set_attribute("gen_ai.usage.completion_tokens", num_tokens)
        self._span.set_attribute("gen_ai.response.finish_reason", reason.name.lower())
        if reason is FinishReason.ERROR:
            self._span.set_status(Status(StatusCode.ERROR, "the engine failed"))
        self._span.end(end_time=self._at_ns(end_us))

    def _child(self, name: str, start_us: int, end_us: int) -> None:
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(self._span)
        child = self._tracer.start_span(name, context=inside, start_time=self._at_ns(start_us))
        child.end(end_time=self._at_ns(end_us))

    def _at_ns(self, time_us: int) -> int:
        return self._wall_ns + 1000 * (time_us - self._arrived_us)
