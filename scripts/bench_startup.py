#!/usr/bin/env python3
"""How long until `loong serve` is ready: with an empty cache folder, and with the one the first start left behind.

Each start is a real server: a process of its own, from its start until its health says SERVING, when it is killed.
`imports`: what a process needs only to import the same modules and find its devices. The model is the project's default
one unless `--model` names another; further arguments go to `loong serve`. A source file that changes between two
starts makes the second one cold.

    scripts/bench_startup.py [--warm-starts 3] [--model DIRECTORY] [--dops 1,8 ...]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SERVE = "from serving.cli import main; main()"
IMPORTS = "import jax, loong_jax.executor, loong_jax.model.checkpoint, serving.cli, serving.launch; jax.devices()"


class Start(NamedTuple):
    """Seconds until ready: of the clock, and of CPU time over all cores."""

    wall_s: float
    cpu_s: float


def imports() -> Start:
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    usage = os.wait4(process.pid, 0)[2]
    return Start(time.monotonic() - started_s, usage.ru_utime + usage.ru_stime)


def serve(model: Path, cache: Path, arguments: list[str]) -> Start:
    """One start; the server is killed once it is ready. Raises RuntimeError when it ends before."""
    flags = ["--platform", "cpu", "--port", "0", "--cache-dir", str(cache), *arguments]
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", SERVE, "serve", str(model), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_ready(address_of(process))
        wall_s, cpu_s = time.monotonic() - started_s, cpu_time_s(process.pid)
    finally:
        process.kill()
        process.wait()
    return Start(wall_s, cpu_s)


def address_of(process: subprocess.Popen) -> str:
    said = []
    for line in process.stdout or ():
        said.append(line)
        if "listening on " in line:
            return line.split("listening on ")[1].split(";")[0].strip()
    raise RuntimeError("the server ended: " + "".join(said))


def wait_ready(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch  # pyright: ignore[reportAttributeAccessIssue] (set when made)
        for response in watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


def cpu_time_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    from loong_jax.default_model import DEFAULT_MODEL

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--warm-starts", type=int, default=3)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = imports()
        print(f"load {os.getloadavg()[0]:.1f}; imports: {base.wall_s:.1f} s, CPU {base.cpu_s:.1f} s", flush=True)
        starts = []
        for label in ["cold"] + ["warm"] * options.warm_starts:
            starts.append(serve(options.model, Path(scratch) / "cache", arguments))
            print(f"{label}: {starts[-1].wall_s:.1f} s, CPU {starts[-1].cpu_s:.1f} s", flush=True)
        store = sum(path.stat().st_size for path in (Path(scratch) / "cache" / "programs").iterdir())
    cold, warm = starts[0], Start(*map(statistics.median, zip(*starts[1:], strict=True)))
    wall, cpu = cold.wall_s / warm.wall_s, cold.cpu_s / warm.cpu_s
    print(f"load {os.getloadavg()[0]:.1f}; store {store / 1e6:.1f} MB")
    print(f"readiness: {cold.wall_s:.1f} -> {warm.wall_s:.1f} s: {wall:.1f}x sooner, {cpu:.1f}x less CPU time")
    wall = (cold.wall_s - base.wall_s) / (warm.wall_s - base.wall_s)
    cpu = (cold.cpu_s - base.cpu_s) / (warm.cpu_s - base.cpu_s)
    print(f"without imports: {wall:.1f}x sooner, {cpu:.1f}x less CPU time")


if __name__ == "__main__":
    main()
