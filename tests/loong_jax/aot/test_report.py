"""What is said of a step: sums of its collectives, and lines."""

from loong_jax.aot.collectives import Collective
from loong_jax.aot.compiled import Memory
from loong_jax.aot.report import GIB, MIB, StepReport, Sum, lines, sums

RING = Collective("collective-permute", "sp", 1024, 96, "fixed", True, 1, 0)
TILE = Collective("collective-permute", "sp", 512, 96, "ring", True, 0, 0)
REDUCE = Collective("all-reduce", "tp", 64, 32, "fixed", True, None, None)


def test_sums():
    assert sums([RING, RING, TILE, REDUCE]) == [
        Sum("collective-permute", "sp", "fixed", "overlapped", 2, 192, 192 * 1024),
        Sum("collective-permute", "sp", "ring", "async", 1, 96, 96 * 512),
        Sum("all-reduce", "tp", "fixed", "sync", 1, 32, 32 * 64),
    ]


def test_lines_name_all_kinds_of_memory():
    memory = Memory(4 * GIB, GIB, GIB, 5 * GIB + GIB // 2, GIB, 0, GIB // 4, 0)
    assert memory.other_bytes == GIB // 2
    kernels, vmem = ["flash_partial"], (4 * MIB, 16 * MIB)
    report = StepReport("prefill", 4, 2, 2048, 1.0, 2.0, 3.0, memory, sums([RING, TILE]), kernels, *vmem, GIB, 10**12)
    text = "\n".join(lines(report))
    assert "prefill: DoP 4 x tp 2, bucket 2048; compiled in 3.0 s of CPU" in text
    assert "5.75 GiB = weights 4.00 + pool 1.00 + other arguments 0.50 + temp 0.25" in text
    assert "4.00 MiB in a kernel, of 16" in text
    assert "collective-permute over sp: overlapped, 1 in the program, 96 x in a step, 0.09 MiB" in text
    assert "async, 1 in the program, 96 x in a step, for each context tile" in text
