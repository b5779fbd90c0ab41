"""The figures of a run, by hand, and that the names are those of vLLM."""

import io

import pytest
from rich.console import Console

from loong_jax.config import ConfigError
from serving.bench import result
from serving.bench.prompts import Item
from serving.bench.runner import Outcome, Run

VLLM = """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests input_lens output_lens ttfts
itls latencies start_times queue_times generated_texts errors mean_ttft_ms median_ttft_ms std_ttft_ms p50_ttft_ms
p99_ttft_ms mean_tpot_ms mean_itl_ms mean_e2el_ms p99_e2el_ms""".split()


def outcome(start_s, times_s, **more):
    pieces = [(time_s, 1) for time_s in times_s]
    fields = {"num_prompt_tokens": 10, "num_tokens": len(pieces), "finish_reason": "length", "text": "48213"} | more
    return Outcome(start_s=start_s, pieces=pieces, latency_s=times_s[-1], **fields)


def made():
    run = Run([Item("a", 10, 3, None, "48213"), Item("b", 10, 1, None, "11111"), Item("c", 10, 3)])
    run.outcomes = {
        0: outcome(0.0, [0.5, 0.6, 0.9], dops={("prefill", 2): 10, ("decode", 1): 2}),
        1: outcome(0.75, [0.1]),
        2: outcome(3.0, [9.0], error="UNAVAILABLE: gone"),
    }
    run.duration_s = 4.0
    return run


def test_figures():
    found = result.summary(made(), objectives_ms={"ttft": 200.0, "tpot": 50.0}, percentiles=(50.0, 99.0))
    assert not set(VLLM) - set(found)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 4)
    assert found["request_throughput"] == 0.5
    assert found["request_goodput"] == 0.25
    assert found["output_throughput"] == 1.0
    assert found["total_token_throughput"] == 6.0
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(200)  # of one request; the other has one token
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert found["median_e2el_ms"] == pytest.approx(500)
    assert found["max_output_tokens_per_s"] == 4
    assert found["max_concurrent_requests"] == 2
    assert found["itls"][0] == pytest.approx([0.1, 0.3])
    assert found["errors"] == ["", "", "UNAVAILABLE: gone"]
    assert (found["loong_answers_right"], found["loong_answers_judged"]) == (1, 2)
    assert found["loong_tokens_by_dop"] == {"decode@1": 2, "prefill@2": 10}
    assert found["loong_slo_attainment"] == pytest.approx(1 / 3)


def test_without_objectives_or_requests():
    found = result.summary(made(), objectives_ms={}, percentiles=(99.0,))
    assert found["request_goodput"] is None
    empty = result.summary(Run([]), objectives_ms={"ttft": 1.0}, percentiles=(99.0,))
    assert (empty["completed"], empty["mean_ttft_ms"], empty["ttfts"]) == (0, 0.0, [])


def test_an_end_that_meets_a_beginning_is_not_at_once():
    assert result.most_at_once([outcome(0.0, [1.0]), outcome(1.0, [1.0])]) == 1
    assert result.most_at_once([]) == 0


def test_the_table_says_it():
    found = result.summary(made(), objectives_ms={"ttft": 200.0}, percentiles=(99.9,))
    console = Console(file=io.StringIO(), width=80)
    head = {"backend": "grpc", "dataset": "needle", "num_prompts": 3}
    console.print(result.table(head | found, ["ttft"], (99.9,)))
    text = console.file.getvalue()
    for words in ("grpc, needle, 3 requests", "Failed requests", "p99.9", "1 of 2", "prefill at DoP 2"):
        assert words in text
    assert "between tokens" not in text


def test_objectives():
    assert result.objectives_of(["ttft:500", "e2el:1.5"]) == {"ttft": 500.0, "e2el": 1.5}
    for text in ("ttft", "ttft:", "ttft:-1", "ttft:nan", "ttft:inf", "itl:5", "x:1", ""):
        with pytest.raises(ConfigError, match="goodput: "):
            result.objectives_of([text])
