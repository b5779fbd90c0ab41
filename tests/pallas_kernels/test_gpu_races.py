"""The barriers of the GPU kernels: no race in the interpreter that looks for them, and broken kernels are caught."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.hopper import MIN_JAX

ROOT = Path(__file__).resolve().parents[2]
CAUGHT = {
    "flash,none,1": set(),
    "flash,dropped wait,1": {"race"},
    "paged,none,1": set(),
    "paged,swapped slot,1": {"race"},
}
MORE = {
    "flash,none,6": set(),
    "flash,missing final wait,1": {"race"},
    "flash,swapped slot,1": {"numbers"},
    "paged,none,6": set(),
    "paged,dropped wait,1": {"race"},
    "paged,missing final wait,1": {"race"},
}


@pytest.mark.skipif(jax.__version_info__ < MIN_JAX, reason="the kernels need a newer jax: test_hopper.py")
@pytest.mark.parametrize("expected", [CAUGHT, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_copies_do_not_race_and_wrong_orders_are_caught(expected: dict[str, set[str]]):
    for word, least in expected.items():  # a process each: one that fails leaves threads behind
        done = subprocess.run(
            [sys.executable, "-m", "tests.pallas_kernels.gpu_races", word],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        [report] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert set(report["signs"]) >= least, (word, report)
        assert bool(report["signs"]) == bool(least), (word, report)
