"""The pool stays in place on TPU: the real TPU compiler, without a TPU, for every reader and writer of pages."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu wheel (extra `tpu`)")
def test_pool_is_in_place_on_tpu():
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.tpu_memory"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 10, done.stdout
    for report in reports:
        # Outputs besides the pool are a scalar; donated inputs besides it are none.
        assert report["alias_bytes"] == report["pool_bytes"], report
        assert report["temp_bytes"] < 8 * MIB < report["pool_bytes"] / 64, report
