"""What /metrics says: vLLM's names where they mean the same, `loong_` for elasticity.

The engine is asked once a scrape for the state that WatchGroups streams too, so nothing is counted twice. What it is
not: the counting (`serving/state.py`, `serving/http/request_metrics.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

import loong_jax
from loong_jax.types import FinishReason
from serving.errors import Refusal
from serving.http.request_metrics import RequestMetrics
from serving.proto.loong.v1 import loong_pb2 as pb

_ANSWER_S = 2.0
_PHASES = {pb.PHASE_PREFILL: "prefill", pb.PHASE_DECODE: "decode"}
_LABELS = ("model_name", "engine")


class Sample(NamedTuple):
    value: float
    labels: tuple[str, ...] = ()


class Metrics:
    """Everything that is scraped. `ask_state` is the engine loop's; `pool_tokens` are KV of all instances."""

    def __init__(
        self, ask_state: Callable[[], Future[pb.State]], requests: RequestMetrics, *, model_name: str, pool_tokens: int
    ) -> None:
        self._ask_state = ask_state
        self._requests = requests
        self._model = (model_name, "0")
        self._pool_tokens = pool_tokens
        self._state: pb.State | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]
        ProcessCollector(registry=self._registry)

    async def scrape(self) -> bytes:
        """The text format. An engine that gives no answer in time is shown by `vllm:engine_healthy` 0."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._state = await asyncio.wrap_future(self._ask_state())
        except (Refusal, TimeoutError):
            self._state = None
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("loong_build_info", "Version of the server", [Sample(1, (loong_jax.__version__,))], "version")
        healthy = self._state is not None
        yield self._gauge("vllm:engine_healthy", "1: the engine answers", [Sample(healthy)])
        yield from self._of_requests()
        if self._state is not None:
            yield from self._of_load(self._state)
            yield from self._of_elasticity(self._state)
            yield from self._of_steps(self._state)

    def _of_requests(self) -> Iterator[Metric]:
        for name, histogram in self._requests.histograms.items():
            family = HistogramMetricFamily(name, name.removeprefix("vllm:").replace("_", " "), labels=_LABELS)
            family.add_metric(self._model, histogram.buckets(), histogram.sum)
            yield family
        ended = [Sample(self._requests.ended[reason], (reason.value,)) for reason in FinishReason]
        yield self._counter("vllm:request_success", "Requests that ended, by reason", ended, "finished_reason")
        refused = [Sample(count, (code,)) for code, count in sorted(self._requests.refusals.items())]
        yield self._counter("loong_refusals", "Requests refused, by code", refused, "code")

    def _of_load(self, state: pb.State) -> Iterator[Metric]:
        used = sum(instance.pages_used for instance in state.instances)
        total = sum(instance.pages_total for instance in state.instances)
        counters = state.counters
        running, waiting = Sample(state.requests_running), Sample(state.requests_waiting)
        yield self._gauge("vllm:num_requests_running", "Requests in steps", [running])
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for room", [waiting])
        yield self._gauge("vllm:kv_cache_usage_perc", "Pages in use, 1 is all", [Sample(used / max(total, 1))])
        if total:
            pages = Sample(1, (str(self._pool_tokens // total), str(total)))
            yield self._gauge("vllm:cache_config_info", "The pool", [pages], "block_size", "num_gpu_blocks")
        prefilled, generated = Sample(counters.tokens_prefilled), Sample(counters.tokens_generated)
        yield self._counter("vllm:prompt_tokens", "Tokens prefilled", [prefilled])
        yield self._counter("vllm:generation_tokens", "Tokens generated", [generated])
        evictions = Sample(counters.evictions + counters.evictions_by_loss)
        yield self._counter("vllm:num_preemptions", "Requests that have to compute KV again", [evictions])

    def _of_elasticity(self, state: pb.State) -> Iterator[Metric]:
        groups = [(group, (_PHASES[group.phase], spans(group.instances))) for group in state.groups]
        for name, help_, field in (
            ("loong_group_dop", "Degree of parallelism of a group of instances", "dop"),
            ("loong_group_requests", "Requests of its batch", "requests"),
            ("loong_group_tokens_per_second", "Tokens computed or generated by it", "tokens_per_s"),
            ("loong_group_masters", "Instances of it that take new KV in decode", "masters"),
        ):
            samples = [Sample(getattr(group, field), labels) for group, labels in groups]
            yield self._gauge(name, help_, samples, "phase", "instances")
        for name, help_, field in (
            ("loong_instance_kv_pages", "Pages of an instance's pool", "pages_total"),
            ("loong_instance_kv_pages_used", "Pages of it in use", "pages_used"),
            ("loong_instance_up", "1: the instance works", "alive"),
        ):
            samples = [Sample(getattr(it, field), (str(it.index),)) for it in state.instances]
            yield self._gauge(name, help_, samples, "instance")
        counters = state.counters
        for name, help_, value in (
            ("loong_scale_ups", "Batches that went on with more instances", counters.scale_ups),
            ("loong_scale_downs", "Batches that went on with fewer instances", counters.scale_downs),
            ("loong_kv_moved_bytes", "KV copied between instances by migrations", counters.kv_bytes_migrated),
            ("loong_kv_kept_bytes", "KV re-homed while it circulated in prefill", counters.kv_bytes_rehomed),
        ):
            yield self._counter(name, help_, [Sample(value)])
        reasons = [Sample(counters.evictions, ("memory",)), Sample(counters.evictions_by_loss, ("loss",))]
        yield self._counter("loong_evictions", "Requests whose KV went before their end", reasons, "reason")

    def _of_steps(self, state: pb.State) -> Iterator[Metric]:
        counters = state.counters
        steps = [Sample(counters.steps_prefill, ("prefill",)), Sample(counters.steps_decode, ("decode",))]
        yield self._counter("loong_steps", "Steps issued", steps, "phase")
        for name, help_, value in (
            ("loong_steps_failed", "Steps that failed", counters.steps_failed),
            ("loong_compiles_after_ready", "Programs compiled after readiness", counters.compiles_after_ready),
            ("loong_cost_refits", "Corrections of the cost model by measured steps", counters.cost_refits),
            ("loong_engine_cpu_seconds", "CPU time of the engine thread", counters.engine_cpu_us / 1e6),
        ):
            yield self._counter(name, help_, [Sample(value)])
        yield self._gauge(
            "loong_programs_ready", "Programs compiled, by set of instances", [Sample(state.programs_ready)]
        )
        yield self._gauge("loong_ready", "1: requests are taken", [Sample(state.ready and not state.draining)])
        for name, help_, field in (
            ("loong_prediction_error_ratio", "Mean size of (predicted - measured) / measured step time", "error"),
            ("loong_prediction_bias_ratio", "Mean of (predicted - measured) / measured step time", "bias"),
        ):
            samples = [Sample(getattr(it, field), (_PHASES[it.phase],)) for it in state.predictions]
            yield self._gauge(name, help_, samples, "phase")

    def _gauge(self, name: str, help_: str, samples: Iterable[Sample], *labels: str) -> Metric:
        return self._filled(GaugeMetricFamily(name, help_, labels=(*_LABELS, *labels)), samples)

    def _counter(self, name: str, help_: str, samples: Iterable[Sample], *labels: str) -> Metric:
        """`_total` is added to its name."""
        return self._filled(CounterMetricFamily(name, help_, labels=(*_LABELS, *labels)), samples)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[Sample]) -> Metric:
        for sample in samples:
            family.add_metric((*self._model, *sample.labels), float(sample.value))
        return family


def spans(instances: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    found: list[list[int]] = []
    for number in sorted(instances):
        if found and found[-1][-1] == number - 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, span)) for span in found)
