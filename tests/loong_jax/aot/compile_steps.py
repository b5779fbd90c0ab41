"""Compiles two-layer engine steps ahead of time and prints what the compiler says of each, one JSON object a line.

    python -m tests.loong_jax.aot.compile_steps v5e:2x4,prefill,4,2,128 v5e:2x4,decode,8,1,64,reference

A case is topology, phase, DoP, tp, head_dim ("wide" for the layers of an 8B model, which VMEM does not hold, or the
name of a model, for its layers; with "/8192" for prefill chunks of so many tokens) and perhaps another attention. Run
as a program: libtpu reads its settings once per process and ends it on some errors. It needs no TPU.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import functools

import msgspec

from loong_jax.aot.collectives import collectives_of
from loong_jax.aot.compiled import measured
from loong_jax.aot.models import model_named
from loong_jax.aot.report import StepReport, report_of
from loong_jax.aot.targets import target
from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.types import Phase, Program

MODEL = ModelConfig(
    family="llama",
    vocab_size=256,  # the compiler takes most of its time for sorts of logits, by their number
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
    dtype="bfloat16",
)
WIDE = msgspec.structs.replace(
    MODEL, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128
)
# With tp 1 256 MiB of pool on each device, and with head_dim 64 as with 128, for lanes are filled up.
CLUSTER = ClusterConfig(
    num_instances=8,
    pages_per_instance=4096,
    slots=64,
    ladder=LadderConfig(prefill_tokens=(512,), decode_rows=(8,), prefill_rows=8),
)
BUCKET = {Phase.PREFILL: 512, Phase.DECODE: 8, Phase.SCORE: 512}


class Report(msgspec.Struct):
    """`permutes`: kernels that run while each permute is under way, -1 for a synchronous one."""

    case: str
    step: StepReport
    permutes: list[int]


def report(case: str) -> Report:
    topology, phase, dop, tp, head_dim, *attention = case.split(",")
    machine = machines(topology)
    num_instances = len(machine.devices) // int(tp)
    dops = tuple(sorted({1, int(dop), num_instances}))
    size, _, chunk = head_dim.partition("/")
    buckets = BUCKET | ({Phase.PREFILL: int(chunk)} if chunk else {})
    ladder = msgspec.structs.replace(CLUSTER.ladder, dops=dops, prefill_tokens=(buckets[Phase.PREFILL],))
    cluster = msgspec.structs.replace(CLUSTER, num_instances=num_instances, tp=int(tp), ladder=ladder)
    if attention:
        cluster = msgspec.structs.replace(cluster, attention=attention[0])
    model = model_of(size)
    program = Program(Phase(phase), int(dop), buckets.get(Phase(phase), cluster.ladder.move_pages))
    step = measured(model, cluster, program, machine.devices, machine.platform)
    permutes = [
        -1 if found.kernels is None else found.kernels
        for found in collectives_of(step.module, cluster.tp)
        if found.kind == "collective-permute"
    ]
    return Report(case, report_of(program, cluster.tp, machine.devices[0], step), permutes)


def model_of(size: str) -> ModelConfig:
    if size == "wide":
        return WIDE
    if size.isdigit():
        return msgspec.structs.replace(MODEL, head_dim=int(size))
    return msgspec.structs.replace(
        model_named(size), num_layers=MODEL.num_layers, vocab_size=MODEL.vocab_size, windows=()
    )


machines = functools.cache(target)


def main(cases: list[str]) -> None:
    for case in cases:
        print(msgspec.json.encode(report(case)).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
