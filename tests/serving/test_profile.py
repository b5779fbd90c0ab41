"""`loong profile` from the outside: a real engine of a small model, and what it says when it cannot."""

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from loong_jax.cost.file import read_cost
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.profile import Batch, Fit, Measurement, work_of
from loong_jax.cost.roofline import shape_of
from loong_jax.model.hf_config import read_config
from serving.profile import table

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "models" / "mha"
CACHE = str(ROOT / ".cache" / "test-serve")


def run(*arguments: str) -> subprocess.CompletedProcess:
    code = "from serving.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "profile", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_every_batch_is_measured_and_the_file_is_of_that_model(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    done = run(
        str(FIXTURE), "--out", str(out), "--platform", "cpu", "--instances", "1", "--cache-dir", CACHE,
        "--pool-tokens", "512", "--max-running", "8", "--prefill-buckets", "64", "--decode-buckets", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout
    cost = read_cost(out, shape_of(read_config(FIXTURE)), 1)
    assert {measured.batch.phase for measured in cost.measured} == {"prefill", "decode"}
    assert all(measured.seconds > 0 for measured in cost.measured)
    assert FittedCost(cost.coefficients, cost.ladder).decode_s(1, 4, 4, 100) > 0


def test_nowhere_to_write_is_told_before_anything_is_built(tmp_path: Path) -> None:
    done = run(str(FIXTURE), "--out", str(tmp_path / "none" / "cost.json"), "--platform", "cpu", "--instances", "1")
    assert done.returncode == 1
    assert "out: there is no folder" in done.stderr


def test_the_table_says_what_a_fit_predicts_that_did_not_see_the_batch() -> None:
    batch = Batch("decode", 2, 8, 1, 16)
    found = Fit({}, (0.01, -0.02), (0.25, float("nan")))
    console = Console(width=100, record=True)
    console.print(table([Measurement(batch, work_of(batch), 0.5)] * 2, found))
    text = console.export_text()
    assert "decode 8 x 16" in text
    assert "+25.0%" in text
    assert "500.00" in text
    assert "1.5%" in text  # mean size
