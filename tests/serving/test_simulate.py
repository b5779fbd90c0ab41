"""`loong simulate` from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app

SMALL = ["simulate", "--num-requests", "30", "--workload", "zipf-1.4", "--rate", "5"]


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*SMALL, *arguments])


def test_one_run_writes_what_was_promised(tmp_path: Path) -> None:
    paths = {flag: tmp_path / flag for flag in ("json", "plot.png", "timeline.png", "trace")}
    result = invoke(*(part for flag, path in paths.items() for part in (f"--{flag.split('.')[0]}", str(path))))
    assert result.exit_code == 0, result.output
    data = json.loads(paths["json"].read_text())
    assert {"slo_attainment", "attainment_by_decile", "goodput", "bound_share", "unfinished"} <= set(data)
    assert data["unfinished"] == 0
    assert json.loads(paths["trace"].read_text())["traceEvents"]
    assert paths["timeline.png"].stat().st_size > 1000
    again = invoke("--json", str(tmp_path / "again"))
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again").read_text())["event_log_hash"] == data["event_log_hash"]


def test_a_sweep_compares_policies(tmp_path: Path) -> None:
    result = invoke("--policies", "elastic,chunked@1x8", "--rates", "2,4", "--json", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "chunked@1x8" in result.output
    data = json.loads((tmp_path / "out").read_text())
    assert [(run["policy"], run["offered_rate"]) for run in data["runs"]] == [
        ("elastic", 2.0), ("elastic", 4.0), ("chunked@1x8", 2.0), ("chunked@1x8", 4.0),
    ]  # fmt: skip
    assert set(data["p90_goodput"]["zipf-1.4"]) == {"elastic", "chunked@1x8"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--policy", "none"], "policy"),
        (["--rates", "1,x"], "rates"),
        (["--rate", "-1"], "rate"),
        (["--rates", "1,2", "--trace", "x"], "trace"),
        (["--hardware", "abacus"], "hardware"),
        (["--workload", "azure"], "traces"),
        (["--page-tokens", "7"], "page_tokens"),
    ],
)
def test_bad_input_names_the_field(arguments: list[str], field: str, capsys: pytest.CaptureFixture) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert field in result.output


def test_jax_is_not_loaded() -> None:
    program = f"""
import sys
from serving.cli import app
try: app({[*SMALL, "--num-requests", "3"]!r})
except SystemExit as end: assert not end.code
assert not {{"jax", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)
