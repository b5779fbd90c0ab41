"""Compiles the steps of an engine for a machine that is not there, and prints what the compiler says.

    scripts/aot.py --topology v5e:2x4 --model llama-3-8b --dop 4 --tp 2 --context 131072 [--json]

What it tells: compile time, memory of a device by kind, collectives (synchronous, asynchronous, behind a kernel), VMEM,
how many tokens of KV would fit, and how long a cold start compiles. A prefill step has both forms of context attention
and retention in one program, a decode step simple and full sampling: which of them runs is data. It needs libtpu
(`pip install 'loong-jax[tpu]'`), for GPUs the CUDA plugin of JAX and ptxas, and no TPU or GPU.
"""

import argparse
import os
import sys
from pathlib import Path

# Before JAX is imported: no chip is looked for, and other processes may use the compiler too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from loong_jax.aot import compiled, plan, report
from loong_jax.aot.models import SHAPES, model_named
from loong_jax.aot.targets import GPUS, TPUS, target
from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.types import Phase
from serving.engine import wanted_programs

STEPS = tuple(phase.value for phase in Phase)


class Result(msgspec.Struct):
    topology: str
    model: str
    devices: int
    instances: int
    context: int
    pages_per_instance: int
    steps: list[report.StepReport]
    room: plan.Room
    readiness: plan.Readiness


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--topology", required=True, help=f"as in v5e:2x4 or h200:8; {', '.join((*TPUS, *GPUS))}")
    parser.add_argument("--model", required=True, help=f"{', '.join(SHAPES)}, or a checkpoint's folder or config.json")
    parser.add_argument("--dop", type=int, default=1, help="instances of the group (default: 1)")
    parser.add_argument("--tp", type=int, default=1, help="devices of an instance (default: 1)")
    parser.add_argument("--context", type=int, default=131072, help="tokens that the group holds (default: 131072)")
    parser.add_argument("--steps", default="prefill,decode,migrate", help=f"of {','.join(STEPS)}")
    parser.add_argument("--prefill-tokens", type=int, help="tokens of an instance in a prefill step")
    parser.add_argument("--decode-rows", type=int, default=32, help="rows of a master in a decode step (default: 32)")
    parser.add_argument("--page-tokens", type=int, default=16, help="tokens of a page (default: 16)")
    parser.add_argument("--layers", type=int, help="as if the model had so many (compile time does not depend on it)")
    parser.add_argument("--attention", choices=("pallas", "reference"), default="pallas")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(words)


def model_of(options: argparse.Namespace) -> ModelConfig:
    model = model_named(options.model)
    if options.layers is None:
        return model
    if not 1 <= options.layers <= model.num_layers:
        raise ValueError(f"layers: {options.layers} is not from 1 to {model.num_layers}")
    windows = model.windows[: options.layers]
    return msgspec.structs.replace(model, num_layers=options.layers, windows=windows)


def phases_of(options: argparse.Namespace) -> list[Phase]:
    for name in (names := options.steps.split(",")):
        if name not in STEPS:
            raise ValueError(f"steps: {name!r} is none of {', '.join(STEPS)}")
    return [Phase(name) for name in names]


def compile_all(options: argparse.Namespace) -> Result:
    """Raises ValueError (and its kinds TargetError, ConfigError, CheckpointError, DoesNotFit) naming the field."""
    model, phases, machine = model_of(options), phases_of(options), target(options.topology)
    sizes = plan.Sizes(
        options.dop, options.tp, options.context, options.prefill_tokens, options.decode_rows, options.page_tokens
    )
    cluster = msgspec.structs.replace(plan.cluster_for(machine, sizes), attention=options.attention)
    steps = []
    for phase in phases:
        if phase is Phase.MIGRATE and cluster.num_instances < 2:
            continue
        program = plan.program_of(phase, cluster, sizes)
        step = compiled.measured(model, cluster, program, machine.devices, machine.platform)
        steps.append(report.report_of(program, cluster.tp, machine.devices[0], step))
        if not options.json:
            print("\n".join(report.lines(steps[-1])), flush=True)
    return Result(
        topology=machine.name,
        model=options.model,
        devices=len(machine.devices),
        instances=cluster.num_instances,
        context=options.context,
        pages_per_instance=cluster.pages_per_instance,
        steps=steps,
        room=plan.room(machine, model, cluster, max(step.memory.total_bytes for step in steps)),
        readiness=readiness_of(cluster, machine.platform, steps),
    )


def readiness_of(cluster: ClusterConfig, platform: str, steps: list[report.StepReport]) -> plan.Readiness:
    needed, others = wanted_programs(cluster, platform, full=False)
    return plan.readiness(needed, others, {Phase(step.phase): step.lower_s + step.compile_s for step in steps})


def summary(result: Result) -> list[str]:
    room, ready = result.room, result.readiness
    return [
        f"{result.topology}: {result.devices} devices, {result.instances} instances; "
        f"{room.free_bytes / report.GIB:.2f} of {room.hbm_bytes / report.GIB:.2f} GiB of a device are left",
        f"  the memory that is left as KV: {room.instance_tokens:,} tokens on an instance, "
        f"{room.machine_tokens:,} on the machine",
        f"  cold start: {ready.needed_programs} programs until it serves, {ready.needed_s:.0f} s of CPU; "
        f"{ready.all_programs} programs and device sets in all, {ready.all_s:.0f} s",
    ]


def main() -> int:
    options = arguments()
    try:
        result = compile_all(options)
    except ValueError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    print(msgspec.json.encode(result).decode() if options.json else "\n".join(summary(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
