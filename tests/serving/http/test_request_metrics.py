"""Times of a request, by hand."""

import pytest

from loong_jax.types import FinishReason
from serving.client import generate_request
from serving.errors import InvalidField, QueueFull
from serving.http.request_metrics import Histogram, RequestMetrics, token_bounds


def sums(metrics: RequestMetrics) -> dict[str, float]:
    """By name, of those that saw something."""
    return {name: it.sum for name, it in metrics.histograms.items() if it.buckets()[-1][1]}


def test_a_bound_belongs_to_its_bucket():
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 1.5, 3):
        histogram.observe(value)
    assert histogram.buckets() == [("1", 2.0), ("2.5", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 6


def test_token_bounds():
    assert token_bounds(60) == (1, 2, 5, 10, 20, 50)


def test_the_times_of_a_request_that_ends():
    metrics = RequestMetrics(1000)
    stream = metrics.stream(generate_request([1], max_tokens=9, n=2), 1_000_000, 50)
    stream.prefilled(1_250_000)
    stream.prefilled(1_300_000)  # its second chunk
    stream.emitted(1, 1_500_000)
    stream.emitted(1, 1_600_000)
    stream.emitted(2, 1_900_000)
    stream.ended(FinishReason.STOP, 4)
    assert sums(metrics) == pytest.approx({
        "vllm:time_to_first_token_seconds": 0.5,
        "vllm:inter_token_latency_seconds": 0.4,
        "vllm:request_time_per_output_token_seconds": 0.4 / 3,
        "vllm:e2e_request_latency_seconds": 0.9,
        "vllm:request_queue_time_seconds": 0.25,
        "vllm:request_prefill_time_seconds": 0.25,
        "vllm:request_decode_time_seconds": 0.4,
        "vllm:request_inference_time_seconds": 0.65,
        "vllm:request_prompt_tokens": 50,
        "vllm:request_generation_tokens": 4,
        "vllm:request_params_n": 2,
        "vllm:request_params_max_tokens": 9,
    })  # fmt: skip
    assert metrics.ended == {FinishReason.STOP: 1}


def test_one_that_is_cancelled_has_no_latency_and_one_without_a_prefill_of_its_own_waits_to_its_first_token():
    metrics = RequestMetrics(1000)
    metrics.stream(generate_request([1]), 0, 1).ended(FinishReason.ABORT, 0)
    assert (sums(metrics), metrics.ended) == ({}, {FinishReason.ABORT: 1})
    fork = metrics.stream(generate_request([1]), 0, 1)
    fork.emitted(1, 500_000)
    fork.ended(FinishReason.LENGTH, 1)
    assert sums(metrics)["vllm:request_queue_time_seconds"] == 0.5
    assert "vllm:request_time_per_output_token_seconds" not in sums(metrics)


def test_refusals_by_code():
    metrics = RequestMetrics(1000)
    for refusal in (QueueFull("x"), QueueFull("x"), InvalidField("a", "b")):
        metrics.refused(refusal)
    assert metrics.refusals == {"queue_full": 2, "invalid_value": 1}
