"""Memory of the compiled steps: the state is donated and aliased whole, and what a step needs besides is small.

On CPU as float32 and as bit patterns of bfloat16; on TPU by its real compiler, without a TPU. That addresses of pools
do not change is held by all tests that run steps (`tests/support/plane.py`).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import msgspec
import pytest

from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.kv_pool import pool_bytes
from loong_jax.types import Phase, Program
from tests.support.collectives import permute_overlaps
from tests.support.compiled import Memory, memory_of
from tests.support.plane import CLUSTER

MIB = 2**20
ROOT = Path(__file__).resolve().parents[3]
F32 = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position=8192,
)
BF16 = msgspec.structs.replace(F32, dtype="bfloat16", head_dim=64)
LARGE = msgspec.structs.replace(CLUSTER, pages_per_instance=4096)  # pools of 64 MiB
PROGRAMS = [
    Program(Phase.PREFILL, 3, 64),
    Program(Phase.PREFILL, 8, 64),
    Program(Phase.DECODE, 3, 4),
    Program(Phase.DECODE, 8, 4),
    Program(Phase.COPY, 1, 8),
    Program(Phase.MIGRATE, 2, 8),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.phase}-{p.dop}")
@pytest.mark.parametrize("model", [F32, BF16], ids=["f32", "bf16"])
def test_pools_stay_in_place(model: ModelConfig, program: Program):
    """Aliased: pool, page table and tokens, all of them. Temporaries: less than an eighth of one layer's pool."""
    assert pool_bytes(model, LARGE, "cpu") == 64 * MIB
    memory = memory_of(model, LARGE, program, jax.devices(), "cpu")
    assert memory.alias_bytes == memory.state_bytes > 64 * MIB
    assert memory.temp_bytes < 64 * MIB / model.num_layers / 8


def prefill_memory(**cluster: int) -> Memory:
    changed: ClusterConfig = msgspec.structs.replace(LARGE, **cluster)
    return memory_of(F32, changed, Program(Phase.PREFILL, 8, 64), jax.devices(), "cpu")


def test_prefill_needs_no_more_for_any_context():
    """Context in the ring costs less than four tiles of one layer's KV: between a tile of 4,096 tokens and one of 64,
    temporaries differ by less than four times the KV of the 4,032 tokens. They are fixed when the step is compiled, so
    wherever context lies, and do not grow with the pool or the tables that could hold it."""
    small, large = prefill_memory(), prefill_memory(ring_tokens=4096)
    kv_bytes = (4096 - CLUSTER.ring_tokens) * 2 * F32.num_kv_heads * F32.head_dim * 4
    assert kv_bytes < large.temp_bytes - small.temp_bytes < 4 * kv_bytes
    assert prefill_memory(pages_per_instance=256).temp_bytes == small.temp_bytes


class TpuReport(msgspec.Struct):
    """See `tpu_memory.py`. `permute_overlaps`: kernels that run while each permute is under way."""

    program: str
    memory: Memory
    kernels: list[str]
    permute_overlaps: list[int]
    num_sync_permutes: int


def tpu_reports(*wanted: str) -> list[TpuReport]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu for this platform: its compiler needs the extra `tpu`")
    done = subprocess.run(
        [sys.executable, "-m", "tests.loong_jax.esp.tpu_memory", *wanted],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    reports = [msgspec.json.decode(line, type=TpuReport) for line in lines]
    assert [report.program for report in reports] == list(wanted)
    return reports


def check_tpu(*wanted: str) -> None:
    for report in tpu_reports(*wanted):
        program, memory = report.program, report.memory
        if "prefill" in program:
            check_ring(report)
        assert memory.state_bytes > 256 * MIB
        assert memory.alias_bytes >= memory.state_bytes, (program, memory)  # the table is padded to tiles
        assert memory.alias_bytes < memory.state_bytes + 4 * MIB, (program, memory)
        assert memory.temp_bytes < 256 * MIB / 8, (program, memory)


def check_ring(report: TpuReport) -> None:
    """K, V and their labels of the chunk and of a context tile: sent by six permutes, each behind a kernel."""
    if "reference" in report.program:
        assert report.kernels == []
        return
    assert "flash_partial" in report.kernels, report
    assert len(report.permute_overlaps) == 6, report
    assert min(report.permute_overlaps) >= 1, report
    assert report.num_sync_permutes == 0, report


def test_permutes_that_wait_are_seen():
    """As XLA schedules a ring of unrolled steps: transfers first, kernels after them."""
    kernel = '%flash.1 = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"'
    start, done = "%s.1 = (f32[8], f32[8]) collective-permute-start(%b)", "%d = f32[8] collective-permute-done(%s.1)"
    lines = lambda *lines: "HloModule m, is_scheduled=true\n" + "\n".join(lines)
    assert permute_overlaps(lines(start, kernel, kernel, done)) == ([2], 0)
    assert permute_overlaps(lines(start, done, kernel)) == ([0], 0)
    assert permute_overlaps(lines(kernel, "%p = f32[8] collective-permute(%b)")) == ([], 1)
    with pytest.raises(ValueError, match="not scheduled"):
        permute_overlaps(kernel)


def test_pools_stay_in_place_on_tpu():
    check_tpu("prefill,8,64", "decode,8,64", "prefill,3,128", "decode,3,128")


@pytest.mark.slow
def test_pools_stay_in_place_on_tpu_in_the_other_sizes():
    check_tpu("prefill,3,64", "decode,3,64", "prefill,8,128", "decode,8,128", "prefill,3,128,reference")
