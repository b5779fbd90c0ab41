"""The command line, up to the engine: help, errors, the environment, `loong generate` against a live server."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loong_jax.config import ClusterConfig, LimitsConfig, ladder_for
from serving import cli
from serving.engine import EngineConfig
from tests.support.live_server import server_in_a_thread


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", "from serving.cli import main; main()", *args]


@pytest.mark.parametrize("name", ["serve", "profile", "worker", "convert", "generate", "chat", "info", "bench"])
def test_every_flag_has_help_and_says_its_default(name):
    import typer

    click_command = typer.main.get_command(cli.app).commands[name]
    for parameter in click_command.params:
        assert parameter.help or parameter.name == "help", parameter.name
        optional = parameter.param_type_name == "option" and not parameter.required and parameter.name != "help"
        said = parameter.show_default or re.search("Default|Absent|absent|repeated|flag", parameter.help or "")
        assert not optional or said or parameter.name in ("prompt", "prompt_file", "token_ids", "chat"), parameter.name


def test_importing_the_command_line_loads_no_jax():
    code = "import serving.cli, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["serve", "nowhere"], 1, "nowhere"),
        (["serve", ".", "--policy", "x"], 1, "policy: 'x'"),
        (["serve", ".", "--dtype", "int4"], 1, "dtype: 'int4'"),
        (["serve", ".", "--warm-up", "none"], 1, "warm-up: 'none'"),
        (["serve", ".", "--platform", "abacus"], 1, "platform: 'abacus'"),
        (["serve", ".", "--dops", "3"], 1, "dops: "),
        (["serve", ".", "--num-processes", "2"], 1, "coordinator: "),
        (["serve", ".", "--num-processes", "3", "--coordinator", "x"], 1, "num_processes: "),
        (["serve", ".", "--port", "99999"], 2, "--port"),
        (["convert", "nowhere", "out"], 1, "nowhere"),
        (["convert", ".", "out"], 1, "config.json: file is missing"),
        (["convert", ".."], 2, "out"),
        (["worker"], 2, "model"),
        (["generate"], 2, "exactly one"),
        (["generate", "--prompt", "a", "--token-ids", "1"], 2, "exactly one"),
        (["generate", "--prompt", "a", "--chat", "b"], 2, "exactly one"),
        (["generate", "--prompt", "a", "--system", "b"], 2, "--system goes with --chat"),
        (["generate", "--token-ids", "1,b"], 1, "token-ids: "),
        (["generate", "--prompt", "a", "--logit-bias", "7:1"], 1, "logit-bias: "),
        (["generate", "--address", "127.0.0.1:1", "--prompt", "a"], 1, "UNAVAILABLE"),
        (["generate", "--prompt-file", "no-such-file"], 1, "no-such-file"),
        (["worker", ".", "--leader", "127.0.0.1:1", "--process-id", "0"], 2, "--process-id"),
    ],
)
def test_errors_are_words_not_tracebacks(args, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, args)
    assert done.exit_code == code, done.output
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_generate_prints_text_ids_and_a_summary():
    def generate(*args: str, stdin: str | None = None) -> tuple[int, str, str]:
        words = ["generate", "--address", address, "--max-tokens", "6", *args]
        done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, words, input=stdin)
        return done.exit_code, done.stdout, done.stderr

    with server_in_a_thread() as address:
        whole = command("generate", "--address", address, "--max-tokens", "6", "--prompt", "ab")
        done = subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "abab\n"), done.stderr
        assert "length; 3 + 6 tokens" in done.stderr
        assert "prefill 3 at DoP 4, decode 5 at DoP 2" in done.stderr
        code, out, _ = generate("--token-ids", "9,8", "--ids")
        assert (code, out.split()) == (0, ["9", "8"] * 3)
        code, out, _ = generate("--prompt-file", "-", "--stop", "z", stdin="xyz")
        assert (code, out) == (0, "xy\n")
        sampling = ("--n", "2", "--temperature", "1", "--logit-bias", "7=-1", "--min-p", "0.1")
        code, out, err = generate("--prompt", "xy", "--max-tokens", "2", *sampling)
        assert (code, out) == (0, "choice 0:\nx\nchoice 1:\nx\n")
        assert "[choice 1: length" in err
        report = ("--top-logprobs", "1", "--prompt-logprobs", "0", "--max-tokens", "1")
        code, out, _ = generate("--token-ids", "65,66", *report)
        assert (code, out) == (0, "prompt[1] -66.0000\n65 -65.0000 | 65 -65.0000\n\n")
        code, _, err = generate("--chat", "hi", "--system", "be brief")
        assert (code, "messages: this model has no chat template" in err) == (1, True)
        code, _, err = generate("--prompt", "a", "--temperature", "-1")
        assert code == 1
        assert "INVALID_ARGUMENT: sampling.temperature: " in err
        code, out, _ = generate("--token-ids", "1", "--max-tokens", "1", "--ids")
        assert (code, out.split()) == (0, ["1"])


def test_the_cpu_platform_sets_the_environment(monkeypatch):
    cluster = ClusterConfig(num_instances=4, tp=2, ladder=ladder_for(4))
    engine = EngineConfig(cluster=cluster, limits=LimitsConfig(), num_processes=2, coordinator="x")
    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1 --xla_force_host_platform_device_count=99")
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    cli._use_platform("default", engine)
    assert os.environ["NPROC"] == "3"
    cli._use_platform("cpu", engine)
    flags = os.environ["XLA_FLAGS"].split()
    assert "--xla_some=1" in flags
    assert "--xla_force_host_platform_device_count=4" in flags
    assert "--xla_force_host_platform_device_count=99" not in flags
    assert (os.environ["JAX_PLATFORMS"], os.environ["NPROC"]) == ("cpu", "8")
