"""`loong bench` from flags to table, JSON and PNG against a live server; wrong flags before anything is sent."""

import asyncio
import inspect
import json

import pytest
from typer.testing import CliRunner

from serving import cli
from serving.bench import command
from tests.support.live_http import live_http


async def ran(**flags):
    """The command in this process: its defaults, and these."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(command.bench).parameters.items()}
    await command._Bench(defaults | flags).run()


def test_table_json_and_picture_over_both(tmp_path, capsys):
    async def play():
        async with live_http() as live:
            port = int(live.live.client.target.rsplit(":", 1)[1])
            wheres = {"grpc": {"port": port}, "openai": {"backend": "openai", "base_url": live.url}}
            for name, where in wheres.items():
                await ran(
                    **where, num_prompts=6, dataset_name="custom", dataset_path=tmp_path / "ask.jsonl", num_warmups=1,
                    goodput=["ttft:60000"], objectives=["tpot:60000"], plot=tmp_path / f"{name}.png", ignore_eos=True,
                    save_detailed=True, result_dir=tmp_path, result_filename=f"{name}.json",
                )  # fmt: skip
                assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "ask.jsonl").write_text('{"prompt": [65, 66, 67], "output_tokens": 4, "answer": "ABC"}\n')
    asyncio.run(play())
    assert capsys.readouterr().out.count("Successful requests") == 2
    for name in ("grpc", "openai"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["completed"], found["failed"], found["backend"]) == (6, 0, name)
        assert found["total_output_tokens"] == 24
        assert found["request_goodput"] == pytest.approx(found["request_throughput"])
        assert found["loong_answers_right"] == 6
        assert found["generated_texts"] == ["ABCA"] * 6


def test_all_failed_is_a_failure(capsys):
    async def play():
        async with live_http() as live:
            port = int(live.live.client.target.rsplit(":", 1)[1])
            with pytest.raises(command.BenchFailed):
                await ran(port=port, num_prompts=3, random_input_len=9, random_output_len=9999)

    asyncio.run(play())
    assert "failed 3 times: INVALID_ARGUMENT: max_tokens: " in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--backend", "ray"], 1, "backend: 'ray'"),
        (["--dataset-name", "x"], 1, "dataset-name: 'x'"),
        (["--dataset-name", "trace"], 1, "dataset-path: "),
        (["--dataset-path", "x"], 1, "dataset-path: random reads no file"),
        (["--goodput", "ttft"], 1, "goodput: 'ttft'"),
        (["--goodput", "ttft:5", "what"], 1, "goodput: 'what'"),
        (["tpot:5"], 1, "'tpot:5' stands alone"),
        (["--request-rate", "0"], 1, "request-rate: "),
        (["--request-rate", "nan"], 1, "request-rate: "),
        (["--burstiness", "0"], 1, "burstiness: "),
        (["--ramp-up-strategy", "linear"], 1, "ramp-up-start-rps"),
        (["--ramp-up-end-rps", "3"], 1, "ramp-up-strategy: "),
        (["--random-range-ratio", "1"], 1, "random-range-ratio: "),
        (["--length-scale", "nan"], 1, "length-scale: "),
        (["--trace-speed", "2"], 1, "trace-speed: "),
        (["--percentile-metrics", "ttfx"], 1, "percentile-metrics: 'ttfx'"),
        (["--metric-percentiles", "200"], 1, "metric-percentiles: "),
        (["--plot", "nowhere/x.png"], 1, "nowhere: there is no such folder"),
        (["--result-dir", "nowhere"], 1, "nowhere: there is no such folder"),
        (["--base-url", "http://x"], 1, "base-url: goes with HTTP"),
        (["--header", "a=b"], 1, "header: goes with HTTP"),
        (["--backend", "openai", "--header", "a"], 1, "header: 'a'"),
        (["--metadata", "a"], 1, "metadata: 'a'"),
        (["--num-prompts", "0"], 2, "--num-prompts"),
        (["--max-concurrency", "0"], 2, "--max-concurrency"),
        (["--port", "1", "--ready-check-timeout-sec", "0"], 1, "not ready within 0 s"),
    ],
)
def test_wrong_flags_are_named(args, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["bench", *args])
    assert done.exit_code == code, done.output
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_file_names_have_no_separators_of_models():
    found = {
        "label": None,
        "backend": "grpc",
        "request_rate": 2.5,
        "max_concurrency": 4,
        "model_id": "org/a b",
        "date": "D",
    }
    assert command._file_name(found) == "grpc-2.5qps-concurrency4-a_b-D.json"
