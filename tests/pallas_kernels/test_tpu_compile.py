"""What the real TPU compiler makes of the kernels and of the pool, without a TPU.

The pool stays in place for every reader and writer of pages; each kernel compiles, so it fits VMEM and SMEM, and copies
none of its inputs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the libtpu wheel (extra `tpu`)"
)


def compiled(module: str, *words: str) -> list[dict]:
    """What the program `tests.pallas_kernels.MODULE` reports."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.pallas_kernels.{module}", *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@NEEDS_LIBTPU
def test_pool_is_in_place_on_tpu():
    reports = compiled("tpu_memory")
    assert len(reports) == 10, reports
    for report in reports:
        # Outputs besides the pool are a scalar; donated inputs besides it are none.
        assert report["alias_bytes"] == report["pool_bytes"], report
        assert report["temp_bytes"] < 8 * MIB < report["pool_bytes"] / 64, report


FLASH_QUICK = ("v5e", "v5e dim 64, odd sizes", "v5e dim 256", "v6e", "v5p", "tpu7x")
FLASH_SLOW = (
    *("v5e long", "v5e dim 80", "v5e dim 96", "v5e float32", "v5e few tokens"),
    *("v6e dim 256", "v5p dim 256", "tpu7x dim 256", "tpu7x long"),
)


@NEEDS_LIBTPU
@pytest.mark.parametrize(
    "names", [FLASH_QUICK, pytest.param(FLASH_SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_flash_partial_compiles_for_tpu_and_copies_nothing(names):
    reports = compiled("tpu_flash", *names)
    assert [report["name"] for report in reports] == list(names)
    for report in reports:
        # lists of steps and labels, and arrays of less than a block filled up to one
        assert report["temp_bytes"] < max(MIB, report["input_bytes"] / 100), report
        # every pair, rounded up to blocks; of several calls the compiler counts one
        assert report["flops"] >= report["all_pairs_flops"] or "long" in report["name"], report


@NEEDS_LIBTPU
@pytest.mark.parametrize(("share", "count"), [("quick", 9), pytest.param("others", 22, marks=pytest.mark.slow)])
def test_paged_partial_compiles_and_copies_no_pool(share: str, count: int):
    reports = compiled("tpu_paged", share)
    assert len(reports) == count, reports
    for report in reports:
        assert report["kernel"], report
        assert report["alias_bytes"] == report["pool_bytes"], report
        # Once to be written and once to be added up.
        assert report["temp_bytes"] < 2 * report["out_bytes"] + MIB < report["pool_bytes"] / 4, report
