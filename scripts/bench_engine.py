#!/usr/bin/env python3
"""The engine on CPU beside `transformers` and OpenVINO GenAI: prefill and decode of one instance, same checkpoint, same
threads, in one run.

A random Llama of about 100M parameters is written once. Each engine runs in a process of its own (the peers in virtual
environments of their own, made here when missing), and takes its turn at every case, so that other work on the machine
slows all of them alike. The machine's limits are measured in the same run: matrix products and reading memory.

    scripts/bench_engine.py [--json OUT] [--engines loong,transformers,openvino] [--dtypes float32,bfloat16]
        [--cases "prefill 512,decode 1 x 512,dop"]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402

from loong_jax.config import ModelConfig, RopeConfig  # noqa: E402
from loong_jax.model.decoder import init_params  # noqa: E402
from loong_jax.model.export import save_checkpoint  # noqa: E402

WORKERS = ROOT / "scripts" / "engine_workers"
WORK = ROOT / "out" / "bench_engine"
PEERS = {
    "transformers": ("torch==2.13.0", "transformers==5.24.0", "safetensors>=0.5"),
    "openvino": ("torch==2.13.0", "optimum-intel[openvino]==2.2.0", "openvino-genai==2026.4.1.0"),
}
"""What each peer's virtual environment holds: versions that were seen to work together."""

MODEL = ModelConfig(
    family="llama", vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12,
    num_kv_heads=4, head_dim=64, max_position=131_072, rope=RopeConfig(theta=500_000.0), tie_embeddings=True,
    bos_id=1, eos_ids=(2,),
)  # fmt: skip
LAYER_WEIGHTS = 12 * (768 * (12 + 2 * 4) * 64 + 12 * 64 * 768 + 3 * 768 * 2048)
HEAD_WEIGHTS = 32_000 * 768
KV_TOKEN_ELEMENTS = 2 * 12 * 4 * 64

PREFILL_TOKENS = (512, 4096, 16_384)
DOP = 8
"""Of the comparison of one prefill on one instance and on as many virtual devices of the same cores."""
DECODE = tuple((batch, context) for context in (512, 4096) for batch in (1, 8, 32))
TIMEOUT_S = 1800


class Case(NamedTuple):
    """`tokens`: of the prompt, or to decode in each row."""

    kind: str
    tokens: int
    batch: int = 1
    context: int = 0

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens}"
        return f"decode {self.batch} x {self.context}"

    def gflop(self) -> float:
        """Of a prefill: twice the weights it multiplies with, and causal attention."""
        attention = 4 * self.tokens**2 / 2 * MODEL.num_heads * MODEL.head_dim * MODEL.num_layers
        return (2 * self.tokens * LAYER_WEIGHTS + attention) / 1e9

    def step_gbytes(self, itemsize: int) -> float:
        """That a decode step must read: weights once, KV of every row."""
        return itemsize * (LAYER_WEIGHTS + HEAD_WEIGHTS + self.batch * self.context * KV_TOKEN_ELEMENTS) / 1e9


CASES = [Case("prefill", tokens) for tokens in PREFILL_TOKENS] + [
    Case("decode", max(4, 32 // batch if context > 512 else 64 // batch), batch, context) for batch, context in DECODE
]
DOP_CASE = "dop"
"""By this name the comparison of one instance with DOP is asked for."""


class Worker:
    """One engine in one process: a case in, seconds out."""

    def __init__(self, command: Sequence[str], log: Path, **variables: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **variables}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._answer()

    def seconds(self, case: Case) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case._asdict()) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print to the same stream
                return json.loads(line)
        raise RuntimeError(f"the engine ended; see {self._log.name}")


def peer_python(name: str) -> Path:
    """The interpreter of a peer's virtual environment, made if missing."""
    environment = WORK / f"venv-{name}"
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        print(f"installing {name} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        # pip takes half an hour to resolve these.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        subprocess.run([python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *PEERS[name]], check=True)
        (environment / "complete").touch()
    return python


def start(engine: str, model: Path, dtype: str) -> Worker:
    python = sys.executable if engine == "loong" else peer_python(engine)
    command = [str(python), str(WORKERS / f"{engine}_worker.py"), str(model), "--dtype", dtype]
    return Worker(command, WORK / f"{engine}-{dtype}.log")


def start_group(model: Path, dtype: str) -> Worker:
    """Loong on one group of DOP virtual devices."""
    command = [sys.executable, str(WORKERS / "loong_worker.py"), str(model), "--dtype", dtype, "--instances", str(DOP)]
    flags = (f"--xla_force_host_platform_device_count={DOP}", "--xla_cpu_collective_call_terminate_timeout_seconds=600")
    log = WORK / f"loong-{dtype}-dop{DOP}.log"
    return Worker(command, log, XLA_FLAGS=" ".join(flags), NPROC=str(2 * DOP))


def make_checkpoint(dtype: str) -> Path:
    """Random weights; the tokenizer is only there because a peer insists on one."""
    directory = WORK / f"llama-100m-{dtype}"
    if not (directory / "complete").exists():
        config = msgspec.structs.replace(MODEL, dtype=dtype)
        save_checkpoint(directory, config, init_params(config, 0))
        for file in (ROOT / "loong_jax" / "default_model").glob("tokenizer*.json"):
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / "complete").touch()
    return directory


def best_s(call: Any, times: int = 5) -> float:
    call()
    taken = []
    for _ in range(times):
        start_s = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start_s)
    return min(taken)


def machine_limits(dtype: str) -> dict[str, float]:
    """GFLOP/s of a large matrix product and GB/s of reading an array larger than caches, the best of a few."""
    size = 2048
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest", preferred_element_type=jnp.float32))
    product_s = best_s(lambda: product(a).block_until_ready())
    long = jnp.ones((64, 1 << 20), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    read_s = best_s(lambda: total(long).block_until_ready())
    return {"gflops": 2 * size**3 / product_s / 1e9, "read_gbytes_s": long.nbytes / read_s / 1e9}


def measure(dtype: str, engines: Sequence[str], names: Sequence[str], repeats: int) -> dict[str, Any]:
    model = make_checkpoint(dtype)
    limits = machine_limits(dtype)
    chosen = [case for case in CASES if case.name in names]
    workers = {engine: start(engine, model, dtype) for engine in engines if chosen}
    itemsize = np.dtype(np.float32).itemsize if dtype == "float32" else 2
    rows = []
    try:
        for case in chosen:
            taken: dict[str, list[float]] = {engine: [] for engine in engines}
            for _ in range(1 + (repeats if case.tokens * case.batch + case.context < 8192 else 1)):
                for engine, worker in workers.items():
                    taken[engine].append(worker.seconds(case))
            # the first turn warms up: other programs, larger caches
            seconds = {engine: min(times[1:]) for engine, times in taken.items()}
            rows.append(summary(case, seconds, limits, itemsize))
            print(line(rows[-1], engines), flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return {"dtype": dtype, "limits": limits, "rows": rows}


def compare_dop(dtype: str, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of one prefill at DoP 1 and at DOP, in turns: what splitting costs where it cannot gain anything."""
    model, case = make_checkpoint(dtype), Case("prefill", tokens)
    workers = {1: start("loong", model, dtype), DOP: start_group(model, dtype)}
    try:
        turns = [{dop: worker.seconds(case) for dop, worker in workers.items()} for _ in range(1 + repeats)]
    finally:
        for worker in workers.values():
            worker.close()
    best = {dop: min(turn[dop] for turn in turns[1:]) for dop in workers}
    return {"tokens": tokens, "dop_1_s": best[1], f"dop_{DOP}_s": best[DOP], "ratio": best[DOP] / best[1]}


def summary(case: Case, seconds: dict[str, float], limits: dict[str, float], itemsize: int) -> dict[str, Any]:
    """Tokens per second and share of the limit, by engine."""
    if case.kind == "prefill":
        tokens, limit_s = case.tokens, case.gflop() / limits["gflops"]
    else:
        tokens, limit_s = case.tokens * case.batch, case.tokens * case.step_gbytes(itemsize) / limits["read_gbytes_s"]
    return {
        "case": case.name,
        "tokens_s": {engine: tokens / taken_s for engine, taken_s in seconds.items()},
        "share_of_limit": {engine: limit_s / taken_s for engine, taken_s in seconds.items()},
    }


def line(row: dict[str, Any], engines: Sequence[str]) -> str:
    cells = [f"{row['tokens_s'][e]:.0f} ({row['share_of_limit'][e]:.0%})" for e in engines]
    own = row["tokens_s"]["loong"]
    ratios = [f"{own / row['tokens_s'][e]:.2f}" for e in engines if e != "loong"]
    return f"| {row['case']} | {' | '.join(cells + ratios)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--engines", default="loong,transformers,openvino")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="turns of a short case, best taken")
    everything = [*(case.name for case in CASES), DOP_CASE]
    parser.add_argument("--cases", default=",".join(everything), help="default: %(default)s")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    engines = args.engines.split(",")
    if engines[0] != "loong":
        parser.error("--engines: loong comes first")
    names = args.cases.split(",")
    if not set(names) <= set(everything):
        parser.error(f"--cases: {', '.join(sorted(set(names) - set(everything)))} is none of {', '.join(everything)}")
    results = []
    for dtype in args.dtypes.split(","):
        ratios = " | ".join(f"loong / {engine}" for engine in engines[1:])
        print(f"\n{dtype}: tokens/s (share of the machine's limit)\n\n| | {' | '.join(engines)} | {ratios} |")
        print("|---" * (2 * len(engines)) + "|")
        results.append(measure(dtype, engines, names, args.repeats))
        limits = results[-1]["limits"]
        print(f"\nlimits: {limits['gflops']:.0f} GFLOP/s, {limits['read_gbytes_s']:.0f} GB/s read")
        if DOP_CASE in names:
            results[-1]["dop"] = dop = compare_dop(dtype, PREFILL_TOKENS[1], args.repeats)
            print(f"prefill {dop['tokens']}, DoP {DOP} against DoP 1: {dop['ratio']:.2f} times the time")
    if args.json:
        report = {"cores": os.cpu_count(), "jax": jax.__version__, "results": results}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
