"""The text of /metrics over the fake engine; the dashboard and the scrape example use what is there."""

import asyncio
import json
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import QueueFull
from serving.http.metrics import Metrics, spans
from serving.http.request_metrics import RequestMetrics
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.live_http import LiveHttp, live_http
from tests.support.live_server import eventually

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
MODEL = {"model_name": "echo", "engine": "0"}
PROMQL = {"by", "rate", "sum", "max", "histogram_quantile", "increase", "instance", "job"}


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(live: LiveHttp) -> dict[tuple[str, frozenset], float]:
    response = await live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(response.text)


def value(found, name: str, **labels: str) -> float:
    return found[name, frozenset({**MODEL, **labels}.items())]


def full_state() -> pb.State:
    return pb.State(
        ready=True,
        groups=[pb.Group(phase=pb.PHASE_DECODE, dop=3, instances=[0, 1, 3], requests=2, tokens_per_s=5, masters=2)],
        instances=[pb.Instance(index=0, pages_used=3, pages_total=8, alive=True)],
        predictions=[pb.Prediction(phase=pb.PHASE_PREFILL, steps=4, error=0.25, bias=-0.125)],
        counters=pb.Counters(
            scale_ups=1, scale_downs=2, kv_bytes_migrated=3, kv_bytes_rehomed=4, compiles_after_ready=5, evictions=6,
            evictions_by_loss=7, engine_cpu_us=500_000,
        ),
    )  # fmt: skip


def text_of(state: pb.State | None) -> str:
    def ask() -> Future[pb.State]:
        answer: Future[pb.State] = Future()
        if state is not None:
            answer.set_result(state)
        return answer

    requests = RequestMetrics(1000)
    requests.refused(QueueFull("x"))
    metrics = Metrics(ask, requests, model_name="echo", pool_tokens=128)
    return asyncio.run(metrics.scrape()).decode()


def test_what_the_engine_says_has_its_place():
    found = samples(text_of(full_state()))
    group = {"phase": "decode", "instances": "0-1,3"}
    assert value(found, "loong_group_dop", **group) == 3
    assert value(found, "loong_group_masters", **group) == 2
    assert value(found, "loong_instance_kv_pages_used", instance="0") == 3
    assert value(found, "vllm:kv_cache_usage_perc") == 3 / 8
    assert value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="8") == 1
    assert value(found, "loong_prediction_bias_ratio", phase="prefill") == -0.125
    assert value(found, "loong_evictions_total", reason="loss") == 7
    assert value(found, "vllm:num_preemptions_total") == 13
    assert value(found, "loong_engine_cpu_seconds_total") == 0.5
    names = ("scale_ups", "scale_downs", "kv_moved_bytes", "kv_kept_bytes")
    totals = [value(found, f"loong_{name}_total") for name in names]
    assert totals == [1, 2, 3, 4]


def test_an_engine_that_does_not_answer_is_not_healthy(monkeypatch):
    monkeypatch.setattr("serving.http.metrics._ANSWER_S", 0.01)
    found = samples(text_of(None))
    assert value(found, "vllm:engine_healthy") == 0
    assert ("loong_ready", frozenset(MODEL.items())) not in found


def test_requests_of_both_listeners_are_counted():
    async def run():
        async with live_http() as live:
            await live.post("/v1/completions", prompt="abc", max_tokens=5, n=2)
            await live.post("/v1/completions", prompt="abc", top_p=0)
            await live.post("/v1/completions", prompt="abc", no_such_field=1)
            await live.live.client.generate(pb.GenerateRequest(text="ab", max_tokens=4))
            await eventually(lambda: not live.live.manager.running)
            found = await scraped(live)
            assert value(found, "vllm:request_success_total", finished_reason="length") == 3
            assert value(found, "vllm:request_generation_tokens_sum") == 14
            assert value(found, "vllm:generation_tokens_total") == 14
            assert value(found, "vllm:time_to_first_token_seconds_count") == 3
            assert value(found, "vllm:inter_token_latency_seconds_count") == 11
            assert value(found, "loong_refusals_total", code="invalid_value") == 2
            assert value(found, "vllm:engine_healthy") == value(found, "loong_ready") == 1
            assert value(found, "vllm:num_requests_running") == 0

    asyncio.run(run())


def test_while_loading_there_are_metrics_too():
    async def run():
        async with live_http(ready=False) as live:
            assert value(await scraped(live), "loong_ready") == 0

    asyncio.run(run())


@pytest.mark.parametrize(("instances", "text"), [((), ""), ((4,), "4"), ((0, 1, 2, 5, 7, 8), "0-2,5,7-8")])
def test_spans(instances, text):
    assert spans(instances) == text


def test_every_metric_of_the_dashboard_exists():
    names = {name for name, _ in samples(text_of(full_state()))}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) >= 20
    for expression in expressions:
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)|\"[^\"]*\"", "", expression)
        used = set(re.findall(r"[a-z_][a-z_:0-9]*", bare)) - PROMQL
        assert used, expression
        assert used <= names, (expression, used - names)
    positions = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(positions)) == len(positions)


def test_the_scrape_example_asks_where_the_server_listens():
    text = (DEPLOY / "prometheus.yml").read_text()
    assert "metrics_path: /metrics" in text
    assert "127.0.0.1:8000" in text
