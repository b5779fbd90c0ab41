"""Engine steps compiled by the real compilers of TPUs and GPUs, without one: memory, VMEM, collectives, overlap, work.

Two layers each. The suite compiles some, the slow leg the full cross. What it is not: whether they are right, which is
seen where they run (`tests/loong_jax/test_token_equality.py`).
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import msgspec
import pytest

from loong_jax.aot.compiled import DoesNotFit, _in_words, measured
from loong_jax.aot.report import Sum
from loong_jax.aot.targets import TargetError, missing_for_gpus
from loong_jax.types import Phase, Program
from tests.loong_jax.aot.compile_steps import BUCKET, CLUSTER, MODEL, WIDE, Report

# Whoever asks first compiles all cases of its list, one after the other.
pytestmark = pytest.mark.timeout(3600)

MIB = 2**20
ROOT = Path(__file__).resolve().parents[3]

ONE_EACH = ("v6e:2x4,decode,4,2,64", "v5p:2x2x2,decode,4,2,128", "tpu7x:2x2x1,decode,4,2,wide")
WIDE_DECODES = ("v5e:2x4,decode,2,2,wide", ONE_EACH[-1])
WIDE_PREFILL = "v5e:2x4,prefill,4,2,wide"
LONG_CHUNKS = "v5p:2x2x2,prefill,2,4,llama-3-70b/8192"
H200 = "h200:8,decode,2,1,128"
# A prefill step takes three times as long to compile as one of decode: the suite has those whose rings it looks at.
SUITE = (
    *("v5e:2x4,decode,1,1,128", "v5e:2x4,decode,2,1,64", "v5e:2x4,decode,3,1,64", "v5e:2x4,decode,4,1,128"),
    *("v5e:2x4,prefill,8,1,128", "v5e:8x8,prefill,16,4,64", LONG_CHUNKS),
    *("v5e:2x4,decode,1,4,128", "v5e:2x4,decode,2,4,64"),
    *(WIDE_DECODES[0], WIDE_PREFILL),
    *ONE_EACH,
    H200,
)
PAIRS = [*((dop, 1) for dop in (1, 2, 3, 4, 8)), (2, 2), (4, 2), (1, 4), (2, 4)]
CROSS = [
    f"v5e:2x4,{phase},{dop},{tp},{dim}"
    for phase, (dop, tp), dim in itertools.product(("prefill", "decode", "score"), PAIRS, (64, 128))
]
CROSS += ["v5e:2x4,prefill,3,1,128,reference", "v6e:8x8,prefill,16,4,128", "v5p:4x4x4,prefill,16,4,128"]
CROSS += [case.replace("decode", "prefill") for case in ONE_EACH] + ["v5e:2x4,migrate,2,1,64", "v5e:2x4,copy,1,1,64"]
LARGE_SLICES = ("v5e:4x8,prefill,32,1,64", "v5e:16x16,prefill,64,4,64", "v5e:8x8,prefill,32,2,64")


def missing_for(case: str) -> str | None:
    """The compiler that a case lacks here, in words."""
    if case.startswith("h200"):
        missing = missing_for_gpus()
        return missing if missing and "ptxas" in missing else None
    return None if importlib.util.find_spec("libtpu") else "no libtpu for this platform: it needs the extra `tpu`"


def report_in(cases: tuple[str, ...], case: str) -> Report:
    if missing := missing_for(case):
        pytest.skip(missing)
    return reports(tuple(case for case in cases if not missing_for(case)))[case]


@cache
def reports(cases: tuple[str, ...]) -> dict[str, Report]:
    """Compiled in a process of its own, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.loong_jax.aot.compile_steps", *cases],
        capture_output=True,
        text=True,
        timeout=3000,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {report.case: report for report in (msgspec.json.decode(line, type=Report) for line in lines)}
    assert list(found) == list(cases)
    return found


def check(report: Report) -> None:
    step = report.step
    check_memory(report)
    if step.phase not in ("migrate", "copy") and "reference" not in report.case:
        check_kernels(report)
    if step.phase in ("prefill", "score"):
        check_ring(report)
    if step.phase == "decode":
        check_exchange(report)


def check_memory(report: Report) -> None:
    """The state is aliased, all of it (its table padded to tiles), and scratch is far from a copy of the pool."""
    memory = report.step.memory
    pool_bytes = 512 * MIB if "wide" in report.case else 256 * MIB  # twice the KV heads
    assert memory.pool_bytes == pool_bytes // report.step.tp, report
    assert memory.state_bytes <= memory.alias_bytes < memory.state_bytes + 4 * MIB, report
    assert memory.temp_bytes < memory.pool_bytes / 8, report
    assert memory.total_bytes < memory.weight_bytes + memory.pool_bytes * 1.25, report


def check_kernels(report: Report) -> None:
    step = report.step
    wanted = {"decode": ["paged_partial"]}.get(step.phase, ["flash_partial", "paged_partial"])
    assert step.kernels == wanted, report
    assert 0 < step.vmem_bytes <= step.vmem_limit_bytes * 3 / 4, report


def check_ring(report: Report) -> None:
    """K, V and their labels, of the chunk and of a context tile: six asynchronous permutes, each behind a kernel, and
    nothing else over `sp` in a layer."""
    step = report.step
    assert len(report.permutes) == (6 if step.dop > 1 else 0), report
    # A ring of one hop is unrolled, and the labels of its chunk, the same in each layer, travel once, before them.
    num_before = 1 if step.dop == 2 else 0
    if "reference" not in report.case:
        assert [kernels for kernels in report.permutes if kernels < 1] == [0] * num_before, report
        alone = [o for o in step.collectives if o.kind == "collective-permute" and o.form != "overlapped"]
        label_bytes = 16 * step.bucket // CLUSTER.page_tokens
        assert [(one.form, one.num_bytes) for one in alone] == [("async", label_bytes)] * num_before, report
    fixed = over_sp(step.collectives, "fixed")
    layers, hops = MODEL.num_layers, step.dop - 1
    assert fixed.get("collective-permute", 0) == (3 - num_before) * layers * hops + num_before, report
    # outside of the layers: what was sampled, and the scores
    outside = {"all-reduce": 1, "all-gather": 1 if step.phase == "score" else 0} if step.dop > 1 else {}
    assert {kind: times for kind, times in fixed.items() if kind != "collective-permute"} == {
        kind: times for kind, times in outside.items() if times
    }, report


def check_exchange(report: Report) -> None:
    """Two collectives a layer over `sp`, whose bytes are those of the rows: nothing of them grows with the context, and
    none stands in a loop whose length is data."""
    step = report.step
    if step.dop == 1:
        assert not [one for one in step.collectives if one.axis == "sp"], report
        return
    assert over_sp(step.collectives, "ring") == over_sp(step.collectives, "query") == {}, report
    layers = MODEL.num_layers
    assert over_sp(step.collectives, "fixed") == {"all-gather": layers + 1, "all-to-all": layers}, report
    model = WIDE if "wide" in report.case else msgspec.structs.replace(MODEL, head_dim=int(report.case.split(",")[4]))
    rows, heads = step.dop * step.bucket, model.num_heads // step.tp
    sampled = 4 * rows * (2 + 2 * CLUSTER.max_top)
    gathered, returned = rows * heads * model.head_dim * 2, rows * heads * (model.head_dim + 1) * 4
    sent = {one.kind: one.num_bytes for one in step.collectives if one.axis == "sp"}
    assert sent == {"all-gather": layers * gathered + sampled, "all-to-all": layers * returned}, report


def over_sp(collectives: list[Sum], part: str) -> dict[str, int]:
    """Kind -> how often it runs in a step over `sp`."""
    found: dict[str, int] = {}
    for one in collectives:
        if one.axis != "tp" and one.part == part:
            found[one.kind] = found.get(one.kind, 0) + one.times
    return found


@pytest.mark.parametrize("case", [case for case in SUITE if case not in (H200, LONG_CHUNKS)])
def test_step(case: str):
    check(report_in(SUITE, case))


def test_two_instances_compute_while_long_chunks_travel():
    """XLA waited for K and V before it attended to either chunk, until it was told not to."""
    check_ring(report_in(SUITE, LONG_CHUNKS))


def test_step_on_h200():
    report = report_in(SUITE, H200)
    memory = report.step.memory
    assert memory.alias_bytes == memory.state_bytes, report
    assert memory.temp_bytes < memory.pool_bytes / 8, report
    assert report.step.compile_s > 0


def _embedding_bytes(tp: int) -> int:
    return WIDE.vocab_size * WIDE.hidden_size * 2 // tp


@pytest.mark.parametrize("case", WIDE_DECODES)
def test_decode_reads_wide_layers_once(case: str):
    """Layers that VMEM does not hold: decode reads its weights (of the embedding some rows) and, in kernels that fetch
    no page twice, KV: at most 1.05 times both. No chip lays them out anew."""
    step = report_in(SUITE, case).step
    weights = step.memory.weight_bytes - _embedding_bytes(step.tp)
    assert weights > 128 * MIB
    assert weights <= step.hbm_read_bytes <= 1.05 * weights
    assert step.memory.temp_bytes < weights / 32, "weights are copied"


def test_prefill_multiplies_what_the_model_does():
    """At most 1.03 times."""
    step = report_in(SUITE, WIDE_PREFILL).step
    layer_params = (step.memory.weight_bytes - 2 * _embedding_bytes(step.tp)) // 2
    model_flops = 2 * BUCKET[Phase.PREFILL] * layer_params
    assert 0.99 * model_flops <= step.matmul_flops <= 1.03 * model_flops


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS)
def test_step_of_the_full_cross(case: str):
    check(report_in(tuple(CROSS), case))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE_SLICES)
def test_rings_of_large_slices(case: str):
    check(report_in(LARGE_SLICES, case))


def test_memory_on_cpu_by_kind():
    program = Program(Phase.COPY, 1, 8)
    step = measured(MODEL, msgspec.structs.replace(CLUSTER, pages_per_instance=64), program, jax.devices(), "cpu")
    assert step.memory.weight_bytes == 0
    assert step.memory.pool_bytes == 64 * 16 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 2
    assert step.memory.state_bytes == step.memory.alias_bytes
    assert step.module.entry


def test_what_the_compiler_says_in_words():
    limited = "INTERNAL: RET_CHECK failure (x.cc:1) On platforms with limited ICI routing device assignment should ..."
    assert isinstance(_in_words(RuntimeError(limited)), TargetError)
    full = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.10G of 15.75G hbm. Exceeded hbm capacity by"
    )
    fits_not = _in_words(RuntimeError(full))
    assert isinstance(fits_not, DoesNotFit)
    assert str(fits_not) == "Used 17.10G of 15.75G hbm"
    other = RuntimeError("something else")
    assert _in_words(other) is other
