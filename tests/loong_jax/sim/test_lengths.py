"""Synthetic data sets have the statistics that are known of the real ones (LoongServe 7.2)."""

import random
from pathlib import Path
from statistics import mean

import pytest

from loong_jax.config import ConfigError
from loong_jax.sim import lengths
from loong_jax.sim.metrics import quantile


def drawn(draw: lengths.Draw, num: int = 20_000) -> tuple[list[int], list[int]]:
    requests = draw(random.Random(1), num)
    return sorted(r.prompt for r in requests), sorted(r.output for r in requests)


def test_sharegpt() -> None:
    prompts, outputs = drawn(lengths.sharegpt)
    assert mean(prompts) == pytest.approx(897, rel=0.03)
    assert mean(outputs) == pytest.approx(233, rel=0.05)
    assert quantile(prompts, 0.9) == pytest.approx(1826, rel=0.02)
    assert prompts[0] >= 4
    assert prompts[-1] <= 2238


def test_leval() -> None:
    prompts, outputs = drawn(lengths.leval)
    assert mean(prompts) == pytest.approx(14_000, rel=0.05)
    assert mean(outputs) == pytest.approx(58, rel=0.25)


def test_lveval() -> None:
    prompts, _ = drawn(lengths.lveval)
    assert 120_000 < mean(prompts) < 150_000
    assert 15_100 <= prompts[0]
    assert 410_000 < prompts[-1] <= 497_300


def test_mixed_is_a_third_of_each() -> None:
    prompts, outputs = drawn(lengths.mixed, 3000)
    assert mean(prompts) == pytest.approx(48_000, rel=0.1)
    assert prompts[999] <= 2_238 < prompts[1000]
    assert outputs[0] >= 4


@pytest.mark.parametrize(
    ("exponent", "average", "median", "p90", "p99"),
    [(1.0, 20_100, 1_400, 74_000, 181_000), (1.2, 7_900, 160, 17_000, 147_000), (1.4, 2_500, 51, 2_000, 70_000)],
)
def test_zipf(exponent: float, average: float, median: float, p90: float, p99: float) -> None:
    exact = sorted(lengths.zipf_lengths(exponent, random.Random(0), 40_000))
    assert mean(exact) == pytest.approx(average, rel=0.06)
    assert [quantile(exact, q) for q in (0.5, 0.9, 0.99)] == pytest.approx([median, p90, p99], rel=0.12)
    prompts, _ = drawn(lengths.zipf(exponent))
    assert mean(prompts) == pytest.approx(average, rel=0.1)


def test_some_prompts_are_a_million_long() -> None:
    prompts, _ = drawn(lengths.with_long(lengths.sharegpt), 1000)
    assert prompts.count(1_000_000) == 10


def test_files(tmp_path: Path) -> None:
    (tmp_path / "azure2023_conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,374,44\n2023-11-16 18:16:01.25,396,109\n"
    )
    (tmp_path / "mooncake_conversation.jsonl").write_text(
        '{"timestamp": 0, "input_length": 9, "output_length": 0}\n'
        '{"timestamp": 1500, "input_length": 8, "output_length": 3}\n'
    )
    (tmp_path / "vidur_arxiv.csv").write_text("num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n")
    (tmp_path / "leval_lengths_chars.csv").write_text("task,prompt_chars,output_chars\ncoursera,25731,1\n")
    assert lengths.read_trace("azure", tmp_path) == ([(374, 44), (396, 109)], (0.0, 14.75))
    assert lengths.read_trace("mooncake", tmp_path) == ([(9, 1), (8, 3)], (0.0, 1.5))
    assert lengths.read_trace("arxiv", tmp_path) == ([(3772, 54)], ())
    assert lengths.read_trace("leval-trace", tmp_path) == ([(6432, 1)], ())
    for name, file in lengths.FILES.items():  # also under another name
        assert lengths.read_trace_file((tmp_path / file).rename(tmp_path / "x")).lengths, name


def test_a_measured_vllm(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"request_id": "b", "input_toks": 9, "output_toks": 2, "arrival_time": 101.5}\n'
        '{"request_id": "a", "input_toks": 8, "output_toks": 0, "arrival_time": 100.0}\n'
    )
    assert lengths.read_trace_file(tmp_path / "x.jsonl") == ([(8, 1), (9, 2)], (0.0, 1.5))


def test_bad_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workload"):
        lengths.read_trace("none", tmp_path)
    with pytest.raises(OSError, match="vidur"):
        lengths.read_trace("arxiv", tmp_path)
    (tmp_path / "vidur_arxiv.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="traces"):
        lengths.read_trace("arxiv", tmp_path)
    with pytest.raises(ConfigError, match="no trace that is known"):
        lengths.read_trace_file(tmp_path / "vidur_arxiv.csv")
    (tmp_path / "vidur_arxiv.csv").write_text("num_prefill_tokens,num_decode_tokens\n")
    with pytest.raises(ConfigError, match="no request"):
        lengths.read_trace_file(tmp_path / "vidur_arxiv.csv")
    with pytest.raises(ConfigError, match="exponent"):
        lengths.zipf(-1.0)
