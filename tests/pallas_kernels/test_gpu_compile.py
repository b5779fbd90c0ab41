"""What the real GPU compiler makes of the kernels for H200, without a GPU: they fit, and copy no pool.

Skipped where a compiler is missing, and says which; on a jax too old for the kernels (Python 3.11's) as well.
"""

import jax
import pytest

from pallas_kernels.hopper import MIN_JAX, SMEM_LIMIT_BYTES
from tests.pallas_kernels.gpu_flash import CASES as FLASH
from tests.pallas_kernels.gpu_paged import CASES as PAGED
from tests.pallas_kernels.gpu_topology import what_is_missing
from tests.pallas_kernels.test_tpu_compile import compiled

MIB = 2**20

if jax.__version_info__ < MIN_JAX:
    pytest.skip(f"the kernels need jax {'.'.join(map(str, MIN_JAX))}: test_hopper.py", allow_module_level=True)
if what_is_missing():
    pytest.skip(what_is_missing(), allow_module_level=True)


def legs(names: list[str], num_quick: int):
    return pytest.mark.parametrize(
        "names",
        [names[:num_quick], pytest.param(names[num_quick:], marks=pytest.mark.slow)],
        ids=["quick", "slow"],
    )


def check_resources(report: dict) -> None:
    assert 0 < report["smem_bytes"] <= SMEM_LIMIT_BYTES, report
    assert 0 < report["registers"] <= 255, report
    # a wide head keeps two accumulators in the registers of one thread, which are not enough
    assert report["spill_bytes"] == 0 or "dim 256" in report["name"], report


@legs(list(FLASH), 6)
def test_flash_partial_compiles(names: list[str]):
    reports = compiled(("gpu_flash", tuple(names)))["gpu_flash"]
    assert [report["name"] for report in reports] == names
    for report in reports:
        check_resources(report)
        assert report["smem_bytes"] <= report["estimated_smem_bytes"] + 1024, report
        # V without padding, what is filled up to whole tiles, and the lists of work
        assert report["temp_bytes"] < 4 * report["input_bytes"] + MIB, report


@legs(list(PAGED), 5)
def test_paged_partial_compiles_and_copies_no_pool(names: list[str]):
    reports = compiled(("gpu_paged", tuple(names)))["gpu_paged"]
    assert [report["name"] for report in reports] == names
    for report in reports:
        check_resources(report)
        assert report["alias_bytes"] == report["pool_bytes"], report
        assert report["temp_bytes"] < report["pool_bytes"] / 16, report
