"""What the real TPU compiler makes of the kernels and of the pool, without a TPU.

The pool stays in place for every reader and writer of pages; each kernel compiles, so it fits VMEM and SMEM, and copies
none of its inputs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Whoever asks first compiles all cases of its leg, one after the other.
pytestmark = pytest.mark.timeout(2000)

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the libtpu wheel (extra `tpu`)"
)

FLASH_QUICK = ("v5e", "v5e dim 64, odd sizes", "v5e dim 256", "v6e", "v5p", "tpu7x")
FLASH_SLOW = (
    *("v5e long", "v5e dim 80", "v5e dim 96", "v5e float32", "v5e few tokens"),
    *("v6e dim 256", "v5p dim 256", "tpu7x dim 256", "tpu7x long"),
)
QUICK = {"tpu_memory": ("64",), "tpu_flash": FLASH_QUICK, "tpu_paged": ("quick",)}
SLOW = {"tpu_memory": ("128",), "tpu_flash": FLASH_SLOW, "tpu_paged": ("others",)}
LEGS = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "slow"])


@cache
def compiled(*programs: tuple[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """What programs of `tests.pallas_kernels` report of their words; in one process, which loads the compiler once."""
    calls = [
        f"from tests.pallas_kernels import {name}; print({name!r}, flush=True); {name}.main({list(words)!r})"
        for name, words in programs
    ]
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(calls)],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports: dict[str, list[dict]] = {name: [] for name, _ in programs}
    name = ""
    for line in done.stdout.splitlines():
        name = line if line in reports else name
        if line.startswith("{"):
            reports[name].append(json.loads(line))
    return reports


def leg(slow: bool) -> dict[str, list[dict]]:
    return compiled(*(SLOW if slow else QUICK).items())


@NEEDS_LIBTPU
@LEGS
def test_pool_is_in_place_on_tpu(slow: bool):
    reports = leg(slow)["tpu_memory"]
    assert len(reports) == 5, reports
    for report in reports:
        # Outputs besides the pool are a scalar; donated inputs besides it are none.
        assert report["alias_bytes"] == report["pool_bytes"], report
        assert report["temp_bytes"] < 8 * MIB < report["pool_bytes"] / 64, report


@NEEDS_LIBTPU
@LEGS
def test_flash_partial_compiles_for_tpu_and_copies_nothing(slow: bool):
    reports = leg(slow)["tpu_flash"]
    assert [report["name"] for report in reports] == list(FLASH_SLOW if slow else FLASH_QUICK)
    for report in reports:
        # lists of steps and labels, and arrays of less than a block filled up to one
        assert report["temp_bytes"] < max(MIB, report["input_bytes"] / 100), report
        # every pair, rounded up to blocks; of several calls the compiler counts one
        assert report["flops"] >= report["all_pairs_flops"] or "long" in report["name"], report


@NEEDS_LIBTPU
@LEGS
def test_paged_partial_compiles_and_copies_no_pool(slow: bool):
    reports = leg(slow)["tpu_paged"]
    assert len(reports) == (25 if slow else 6), reports
    for report in reports:
        assert report["kernel"], report
        assert report["alias_bytes"] == report["pool_bytes"], report
        # Once to be written and once to be added up.
        assert report["temp_bytes"] < 2 * report["out_bytes"] + MIB < report["pool_bytes"] / 4, report
