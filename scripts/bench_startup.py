#!/usr/bin/env python3
"""How long until the minimal ladder is at hand: with an empty program store, and with a warm one.

Each start is a process of its own. The minimal ladder is every program of DoP 1 and of the largest DoP, on all its
device sets. `imports_s`: from the process's start until JAX and its backend are there; `warm_up_s`: from there to
readiness. A source file that changes between two starts makes the second one cold.

    scripts/bench_startup.py                      the engine's own steps, on 8 virtual CPU devices
    scripts/bench_startup.py --engine module:function   something else; function(num_instances) -> Engine
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Engine(NamedTuple):
    """What a start-up needs of an engine: see `loong_jax.programs.Programs`."""

    build: Callable[[Any], Any]
    mesh_of: Callable[[tuple[int, ...]], Any]
    programs: tuple[Any, ...]
    fingerprint: str


def loong(num_instances: int) -> Engine:
    """The engine's steps for a small Llama of four layers, and its default ladder."""
    import jax

    from loong_jax.config import ClusterConfig, ModelConfig, ladder_for
    from loong_jax.esp.groups import Devices
    from loong_jax.esp.steps import StepBuilder
    from loong_jax.program_store import fingerprint

    model = ModelConfig(
        family="llama",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_position=131072,
    )
    cluster = ClusterConfig(num_instances=num_instances, ladder=ladder_for(num_instances))
    devices = Devices(jax.devices(), num_instances, cluster.tp)
    sources = fingerprint([ROOT / "loong_jax", ROOT / "pallas_kernels"], repr(model), repr(cluster))
    builder = StepBuilder(model, cluster, jax.devices()[0].platform)
    return Engine(builder.build, devices.mesh, cluster.ladder.programs(), sources)


def small_llama(num_instances: int) -> Engine:
    """The stand-in of the tests: no page tables, no sampling."""
    import jax

    from loong_jax.config import ladder_for
    from loong_jax.types import Phase
    from tests.support.small_llama import SmallLlama

    engine = SmallLlama(jax.devices()[:num_instances])
    programs = [p for p in ladder_for(num_instances).programs() if p.phase in (Phase.PREFILL, Phase.DECODE)]
    return Engine(engine.build, engine.mesh_of, tuple(programs), "small llama")


def start(engine_name: str, num_instances: int, directory: str, started_s: float) -> None:
    """One start, in this process; prints what it took as JSON."""
    import jax

    from loong_jax.device_sets import device_sets, on_sets
    from loong_jax.program_store import ProgramStore, enable_jax_cache
    from loong_jax.programs import Programs

    enable_jax_cache(Path(directory) / "jax")
    module, _, function = engine_name.rpartition(":")
    engine = (
        getattr(importlib.import_module(module), function)(num_instances)
        if module
        else globals()[function](num_instances)
    )
    imported_s, imported_cpu_s = time.time(), time.process_time()

    flags = os.environ.get("XLA_FLAGS", "")
    store = ProgramStore(Path(directory) / "programs")
    programs = Programs(engine.build, engine.mesh_of, store, lambda event: None, engine.fingerprint + flags)
    dops = {1, max(p.dop for p in engine.programs)}
    sets = device_sets(num_instances, sorted(dops), jax.devices()[0].platform)
    minimal = on_sets([p for p in engine.programs if p.dop in dops], sets)
    programs.warm_up(minimal)
    programs.mark_ready()
    result = {
        "programs": len({program for program, _ in minimal}),
        "executables": len(programs.ready),
        "imports_s": imported_s - started_s,
        "warm_up_s": time.time() - imported_s,
        "warm_up_cpu_s": time.process_time() - imported_cpu_s,
        "store_bytes": store.size_bytes(),
    }
    programs.close()
    print(json.dumps(result))


def environment(num_devices: int) -> dict[str, str]:
    variables = dict(os.environ)
    variables.setdefault("JAX_PLATFORMS", "cpu")
    if variables["JAX_PLATFORMS"] == "cpu":
        variables.setdefault("NPROC", str(2 * num_devices))
        variables.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={num_devices}")
    return variables


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engine", default="loong", help="loong, small_llama, or module:function")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--warm-starts", type=int, default=3)
    parser.add_argument("--one-start", nargs=2, metavar=("DIRECTORY", "STARTED_S"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_start:
        start(options.engine, options.instances, options.one_start[0], float(options.one_start[1]))
        return

    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for label in ["cold"] + ["warm"] * options.warm_starts:
            arguments = [sys.executable, __file__, "--engine", options.engine, "--instances", str(options.instances)]
            output = subprocess.run(
                [*arguments, "--one-start", directory, str(time.time())],
                env=environment(2 * options.instances),
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            ).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(label, json.dumps({k: round(v, 2) for k, v in runs[-1].items()}), flush=True)
    cold, warm = runs[0], min(runs[1:], key=lambda run: run["warm_up_s"])
    print(f"warm-up: {cold['warm_up_s'] / warm['warm_up_s']:.1f}x sooner", end=", ")
    print(f"CPU time {cold['warm_up_cpu_s'] / warm['warm_up_cpu_s']:.1f}x less", end=", ")
    total = [run["imports_s"] + run["warm_up_s"] for run in (cold, warm)]
    print(f"from the start of the process {total[0]:.1f} s -> {total[1]:.1f} s: {total[0] / total[1]:.1f}x")


if __name__ == "__main__":
    main()
