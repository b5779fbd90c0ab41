"""Loading a random checkpoint: peak host memory beside the shards held, and time beside reading the files once.

    python scripts/bench_loading.py [--json OUT] [--gib 2] [--folder DIR]

Makes a sharded float32 Llama in a temporary folder (or in DIR, kept for the next time), converts it to Orbax as well,
and loads both onto virtual CPU devices, each time in a process of its own: one and two instances, tp 1 and 2. A
device's memory is host memory here, so what is held at the end is the shards themselves. Memory is anonymous memory
(RssAnon of /proc/self/status, sampled every 2 ms) above what the process had when JAX was ready: pages of the page
cache belong to the system. The files are read once in the same process, before, in blocks of 8 MiB; `cold` rows drop
them from the page cache before the reading and before the loading. `new memory` is the time to fill as much memory that
the process did not have before, since a system may charge more for that than for reading. Rows are in order of runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK_BYTES = 8 * 1024 * 1024
ROWS = [(1, 1, False), (1, 2, False), (2, 1, False), (2, 2, False), (1, 1, True)]  # instances, tp, cold


def rss_anon_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class PeakMemory:
    """A context manager: the most anonymous memory while it was open."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = rss_anon_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, rss_anon_bytes())


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_from_cache(folder: Path) -> None:
    for path in weight_files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Seconds."""
    buffer, start_s = bytearray(BLOCK_BYTES), time.perf_counter()
    for path in weight_files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start_s


def measure(folder: Path, instances: int, tp: int, cold: bool) -> dict[str, Any]:
    """In a process of its own."""
    import jax
    import numpy as np

    from loong_jax.model.checkpoint import load_checkpoint
    from loong_jax.model.hf_config import read_config

    devices = [jax.devices()[i * tp : (i + 1) * tp] for i in range(instances)]
    jax.block_until_ready([jax.device_put(0.0, device) for row in devices for device in row])
    if cold:
        drop_from_cache(folder)
    read_s = read_once(folder)
    if cold:
        drop_from_cache(folder)
    config = read_config(folder)
    before_bytes = rss_anon_bytes()
    with PeakMemory() as peak:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        loaded = load_checkpoint(folder, config, tp=tp, devices=devices, stacked=False)
        jax.block_until_ready(loaded)
        load_s, load_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    leaves = jax.tree.leaves(loaded)
    # Devices of one process may share a buffer: what is held is counted once.
    held_bytes = sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in leaves}.values())
    start_s = time.perf_counter()
    np.empty(held_bytes, np.uint8).fill(1)
    touch_s = time.perf_counter() - start_s
    return {
        "form": "orbax" if (folder / "weights").exists() else "safetensors",
        "instances": instances,
        "tp": tp,
        "cold": cold,
        "shards_bytes": sum(leaf.nbytes for leaf in leaves),
        "held_bytes": held_bytes,
        "before_bytes": before_bytes,
        "peak_bytes": peak.bytes - before_bytes,
        "peak_over_shards": (peak.bytes - before_bytes) / held_bytes,
        "read_s": read_s,
        "load_s": load_s,
        "touch_s": touch_s,
        "load_cpu_s": load_cpu_s,
        "load_over_read": load_s / read_s,
        "load_over_read_and_touch": load_s / (read_s + touch_s),
    }


def make_checkpoint(folder: Path, gib: float) -> None:
    """Random tensors, in files of about half a GiB."""
    import msgspec
    import numpy as np
    from safetensors.numpy import save_file

    from loong_jax.config import ModelConfig
    from loong_jax.model.export import hf_config
    from loong_jax.model.leaves import leaves_of

    config = ModelConfig("llama", 32_000, 2048, 5632, 1, 32, 8, 64, 4096)
    shape_bytes = lambda model: sum(4 * int(np.prod(p.shape)) for leaf in leaves_of(model, 1, 0) for p in leaf.pieces)
    two = msgspec.structs.replace(config, num_layers=2)
    layer_bytes = shape_bytes(two) - shape_bytes(config)
    num_layers = max(1, round((gib * 2**30 - shape_bytes(config)) / layer_bytes) + 1)
    config = msgspec.structs.replace(config, num_layers=num_layers)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    part: dict[str, np.ndarray] = {}
    file_of: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(file_of.values())):05d}.safetensors"
        file_of.update(dict.fromkeys(part, name))
        save_file(part, folder / name)
        part.clear()

    for leaf in leaves_of(config, 1, 0):
        for piece in leaf.pieces:
            part[piece.name] = rng.standard_normal(piece.shape, np.float32) * 0.02
            if sum(tensor.nbytes for tensor in part.values()) > 2**29:
                write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(hf_config(config)))


def run(folder: Path, gib: float) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["TPU_SKIP_MDS_QUERY"] = "1"
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

    def child(*words: object) -> str:
        command = [sys.executable, __file__, *map(str, words)]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    source, converted = folder / "safetensors", folder / "orbax"
    if not source.exists():
        child("--make", source, "--gib", gib)
    if not converted.exists():
        subprocess.run(
            [sys.executable, "-c", "from serving.cli import main; main()", "convert", str(source), str(converted)],
            env=environment,
            check=True,
        )
    rows = []
    for instances, tp, cold in ROWS:
        for form in (source, converted):
            row = json.loads(child("--measure", form, instances, tp, int(cold)))
            rows.append(row)
            print(
                f"{row['form']:11} {instances} x tp {tp}{' cold' if cold else '     '}:"
                f" shards {row['held_bytes'] / 1e9:.2f} GB,"
                f" peak {row['peak_over_shards']:.3f}x; read {row['read_s']:.2f} s, load {row['load_s']:.2f} s, of"
                f" CPU {row['load_cpu_s']:.2f} s ({row['load_over_read']:.1f}x); new memory {row['touch_s']:.2f} s",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept; default: nowhere")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.make, arguments.gib)
        return
    if arguments.measure:
        folder, instances, tp, cold = arguments.measure
        print(json.dumps(measure(Path(folder), int(instances), int(tp), bool(int(cold)))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(arguments.folder or Path(scratch), arguments.gib)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "num_cpus": os.cpu_count()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
