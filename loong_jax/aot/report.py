"""What the compiler says of a step, as data, and as lines for people.

What it is not: the compile (`compiled.py`), or the reading of programs (`collectives.py`, `work.py`).
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from loong_jax.aot.collectives import Collective, collectives_of
from loong_jax.aot.compiled import Memory, Step, kernels_of
from loong_jax.aot.work import hbm_read_bytes, matmul_flops, vmem_bytes
from loong_jax.retarget import Device
from loong_jax.types import Program
from pallas_kernels.chips import chip_of

GIB, MIB = 2**30, 2**20


class Sum(msgspec.Struct, frozen=True):
    """Collectives of one kind, axis, part and form: how many operations the program has, how often they run in a step
    (loops whose trip count is data: once), and their bytes in a step on one device."""

    kind: str
    axis: str
    part: str
    form: str
    operations: int
    times: int
    num_bytes: int


class StepReport(msgspec.Struct, frozen=True):
    """One program on one device set. `vmem_limit_bytes`: what the chip has (0: no TPU). `hbm_read_bytes`,
    `matmul_flops`: of one device, without kernels (`work.py`)."""

    phase: str
    dop: int
    tp: int
    bucket: int
    lower_s: float
    compile_s: float
    wall_s: float
    memory: Memory
    collectives: list[Sum]
    kernels: list[str]
    vmem_bytes: int
    vmem_limit_bytes: int
    hbm_read_bytes: int
    matmul_flops: int


def report_of(program: Program, tp: int, device: Device, step: Step) -> StepReport:
    """`device`: one of those it was compiled for."""
    return StepReport(
        phase=program.phase.value,
        dop=program.dop,
        tp=tp,
        bucket=program.bucket,
        lower_s=round(step.lower_s, 2),
        compile_s=round(step.compile_s, 2),
        wall_s=round(step.wall_s, 2),
        memory=step.memory,
        collectives=sums(collectives_of(step.module, tp)),
        kernels=kernels_of(step.compiled),
        vmem_bytes=vmem_bytes(step.module),
        vmem_limit_bytes=chip_of(device.device_kind).vmem_bytes if device.platform == "tpu" else 0,
        hbm_read_bytes=hbm_read_bytes(step.module),
        matmul_flops=matmul_flops(step.module),
    )


def sums(collectives: Iterable[Collective]) -> list[Sum]:
    operations, times, num_bytes = Counter(), Counter(), Counter()
    for one in collectives:
        key = one.kind, one.axis, one.part, one.form
        operations[key] += 1
        times[key] += one.times
        num_bytes[key] += one.times * one.num_bytes
    return [
        Sum(kind, axis, part, form, operations[key], times[key], num_bytes[key])
        for key in operations
        for kind, axis, part, form in [key]
    ]


def lines(report: StepReport) -> list[str]:
    """For a terminal."""
    memory = report.memory
    parts = {
        "weights": memory.weight_bytes,
        "pool": memory.pool_bytes,
        "other arguments": memory.other_bytes,
        "results": memory.output_bytes,
        "temp": memory.temp_bytes,
        "code": memory.code_bytes,
    }
    out = [
        f"{report.phase}: DoP {report.dop} x tp {report.tp}, bucket {report.bucket}; "
        f"compiled in {report.lower_s + report.compile_s:.1f} s of CPU ({report.wall_s:.1f} s)",
        f"  HBM of a device  {memory.total_bytes / GIB:8.2f} GiB = "
        + " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= GIB // 200),
        f"  VMEM             {report.vmem_bytes / MIB:8.2f} MiB in a kernel, of {report.vmem_limit_bytes / MIB:.0f}; "
        f"kernels: {', '.join(report.kernels) or 'none'}",
        f"  without kernels  {report.hbm_read_bytes / GIB:8.2f} GiB read, "
        f"{report.matmul_flops / 1e12:.3f} TFLOP of matrix products",
    ]
    for one in report.collectives:
        where = {"fixed": "", "ring": ", for each context tile", "query": ", for each tile of gathered queries"}
        out.append(
            f"  {one.kind:18} over {one.axis}: {one.form}, {one.operations} in the program, {one.times} x in a step"
            f"{where[one.part]}, {one.num_bytes / MIB:.2f} MiB"
        )
    return out
