"""Spellings of others, and the file of flags: where each value comes from, and what is said of wrong ones."""

import pytest
import typer
from typer.testing import CliRunner

from serving import cli
from serving.spellings import HINTS, respelled


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Invoke `loong serve` up to the launch; returns what would be launched."""
    seen = []

    async def serve(config, reporter):
        seen.append(config)

    monkeypatch.setattr(cli.launch, "serve", serve)
    monkeypatch.setattr(cli, "_use_platform", lambda platform, engine: None)
    monkeypatch.chdir(tmp_path)

    def invoke(*args):
        done = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["serve", *args])
        return seen.pop() if done.exit_code == 0 else done

    return invoke


def test_other_spellings_mean_the_same(launched, tmp_path):
    ours = launched(str(tmp_path), "--tp", "2", "--page-tokens", "32", "--max-running", "9", "--chunk-tokens", "512")
    theirs = launched(
        "--model", str(tmp_path), "--tensor-parallel-size=2", "--block_size", "32", "--max-num-seqs", "9",
        "--max_num_batched_tokens=512",
    )  # fmt: skip
    assert theirs == ours
    assert ours.engine.cluster.tp == 2
    assert launched("-tp", "2", "--", str(tmp_path)).engine.cluster.tp == 2
    assert launched(str(tmp_path), "--context-length", "99").max_model_len == 99


@pytest.mark.parametrize("flag", HINTS)
def test_what_is_not_here_says_what_to_do(launched, flag):
    done = launched(flag, "1")
    assert done.exit_code == 2
    assert HINTS[flag].split(":")[0] in done.stderr.replace("\n", " ")


def test_names_only_are_respelled():
    assert respelled(["--event_log=a_b", "x_y", "--", "--model"]) == ["--event-log=a_b", "x_y", "--", "--model"]
    with pytest.raises(typer.BadParameter, match="--model needs a folder"):
        respelled(["--model"])
    with pytest.raises(typer.BadParameter, match="no cache of prefixes"):
        respelled(["--no-enable-prefix-caching"])


def test_hints_are_of_flags_that_are_not_ours():
    command = typer.main.get_command(cli.app).commands["serve"]
    ours = {spelling for parameter in command.params for spelling in parameter.opts}
    assert not ours & set(HINTS)


def test_the_file_gives_defaults_and_the_command_line_goes_before(launched, tmp_path):
    path = tmp_path / "loong.toml"
    path.write_text(
        f"""
        model = "{tmp_path}"
        instances = 4
        tensor_parallel_size = 2   # as vLLM spells it
        dops = [1, 2, 4]
        drain-s = 5
        allow-anyone = true
        host = "0.0.0.0"
        """
    )
    config = launched("--config", str(path), "--instances", "8", "--port", "0")
    assert (config.directory, config.engine.cluster.tp, config.server.drain_s) == (tmp_path, 2, 5.0)
    assert config.engine.cluster.num_instances == 8
    assert config.engine.cluster.ladder.dops == (1, 2, 4)
    assert config.access.anyone


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("instances = ", "is no TOML"),
        ("instancez = 3", "instancez: there is no such flag"),
        ("config = 'x'", "config: there is no such flag"),
        ("gpu_memory_utilization = 0.9", "the pool is sized in tokens"),
        ("tp = 1\ntensor-parallel-size = 2", "given twice"),
        ("instances = 2.5", "--instances"),
        ("instances = 'many'", "--instances"),
        ("port = 99999", "--port"),
        ("dops = ['a']", "is no value of a flag"),
        ("[serve]\ntp = 1", "serve: there is no such flag"),
        ("[tp]\nx = 1", "is no value of a flag"),
    ],
)
def test_wrong_files_are_refused_by_key(launched, tmp_path, content, words):
    (tmp_path / "x.toml").write_text(content)
    done = launched("--config", "x.toml")
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_are_not_there(launched, tmp_path):
    assert "nowhere.toml: No such file" in launched("--config", "nowhere.toml").stderr
    assert launched("--config", str(tmp_path)).exit_code == 2
