#!/usr/bin/env python3
"""What an owner of an H200 runs: the GPU kernels and the engine on the device, beside what they are judged by.

    scripts/h200.py                            everything that out/h200/results.jsonl lacks, for ten minutes at most
    scripts/h200.py --only prefill,decode      some parts: conformance, prefill, decode, engine
    scripts/h200.py --limit-s 240 --item-s 60  a short loan of a device; run it again to go on
    scripts/h200.py --list | --report          what there is to measure; what is known, measuring nothing
    scripts/h200.py --tiny                     the same code in tiny sizes, also on a CPU

Needs `pip install '.[cuda,test]'` on Python 3.12 (jax 0.11.2 or later). Each measurement is asked of a child process,
so that a kernel that hangs or breaks the device costs its own time and no other result; what failed is tried again in
the next run. docs/h200.md tells what is measured, and the targets. What it is not: a tuner (`scripts/tune_kernels.py`).
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
from on_gpu.figures import Figures  # noqa: E402

PARTS = ("conformance", "prefill", "decode", "engine")
START_S = 120.0
"""Until a child has found its device."""


class Result(msgspec.Struct):
    """Of one measurement: figures, or what went wrong. `machine`: device and jax."""

    item: str  # "part/name"
    machine: str
    took_s: float
    figures: Figures | None = None
    error: str = ""


class NoAnswer(RuntimeError):
    """The child ended, or said nothing in time."""


class Child:
    """A process that measures one item after the other. `command` answers each line with a line of JSON, and says
    `{"machine": ...}` first."""

    def __init__(self, command: Sequence[str]):
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.machine = self._answer(START_S)["machine"]

    def ask(self, item: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(item + "\n")
        self._process.stdin.flush()
        return self._answer(timeout_s)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print to the same stream
                self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise NoAnswer(f"no answer in {timeout_s:.0f} s") from None
        if not line:
            self.close()
            raise NoAnswer(f"the process ended with {self._process.returncode}")
        return json.loads(line)


def measure_all(
    items: Sequence[str],
    start: Callable[[], Child],
    keep: Callable[[Result], None],
    limit_s: float,
    item_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Measures `items` in order and gives each result to `keep`. True if the time sufficed for all."""
    until_s, child = clock() + limit_s, None
    try:
        for item in items:
            child = child or start()
            start_s = clock()
            left_s = until_s - start_s
            if left_s <= 0:
                return False
            try:
                answer = child.ask(item, min(item_s, left_s))
            except NoAnswer as error:
                if clock() >= until_s and left_s < item_s:
                    return False  # cut short by the run's own end, which says nothing of the item
                answer, machine, child = {"error": str(error)}, child.machine, None
            else:
                machine = child.machine
            took_s = round(clock() - start_s, 2)
            keep(msgspec.convert({"item": item, "machine": machine, "took_s": took_s, **answer}, Result))
        return True
    finally:
        if child is not None:
            child.close()


def serve(tiny: bool, kernel_sizes: str) -> None:
    """The child: a line with an item in, a line of JSON out."""
    import jax

    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(json.dumps({"machine": machine}), flush=True)
    for line in sys.stdin:
        try:
            answer = {"figures": msgspec.to_builtins(measure(line.strip(), tiny, kernel_sizes))}
        except BaseException as error:  # also pytest's failures, which are no Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps(answer), flush=True)


def measure(item: str, tiny: bool, kernel_sizes: str) -> Figures:
    part, _, name = item.partition("/")
    if part == "engine":
        from on_gpu import served

        return served.measure(name, tiny, kernel_sizes)
    from on_gpu import conformance, decode, prefill

    return {"conformance": conformance, "prefill": prefill, "decode": decode}[part].measure(name, tiny)


def items_of(parts: Sequence[str], tiny: bool) -> list[str]:
    from on_gpu import conformance, decode, prefill, served

    modules = {"conformance": conformance, "prefill": prefill, "decode": decode, "engine": served}
    return [f"{part}/{name}" for part in parts for name in modules[part].names(tiny)]


def known(path: Path) -> dict[str, Result]:
    """The latest result of each item."""
    if not path.exists():
        return {}
    lines = (msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines())
    return {result.item: result for result in lines}


def in_words(result: Result) -> str:
    said = f"FAILED: {result.error}" if result.figures is None else result.figures.in_words
    return f"{result.item} ({result.took_s:.0f} s): {said}"


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of the whole run (default: 600)")
    parser.add_argument("--item-s", type=float, default=180.0, help="of one measurement, compiling included")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "h200" / "results.jsonl", help="results so far")
    parser.add_argument("--kernel-sizes", default="", help="for the engine: a file of scripts/tune_kernels.py")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also on a CPU: shows that the script runs")
    parser.add_argument("--list", action="store_true", help="only tell what there is to measure")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="at the end all results as one JSON object")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(words: list[str] | None = None) -> int:
    parser = parser_of()
    options = parser.parse_args(words)
    if wrong := [part for part in options.only.split(",") if part not in PARTS]:
        parser.error(f"--only: {wrong[0]!r} is none of {', '.join(PARTS)}")
    if options.limit_s <= 0 or options.item_s <= 0:
        parser.error("--limit-s, --item-s: must be positive")
    if options.child:
        serve(options.tiny, options.kernel_sizes)
        return 0
    items = items_of(options.only.split(","), options.tiny)
    if options.list:
        print("\n".join(items))
        return 0
    results = known(options.out)
    finished = True

    def keep(result: Result) -> None:
        results[result.item] = result
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
        print(in_words(result), file=sys.stderr, flush=True)

    if not options.report:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--kernel-sizes", options.kernel_sizes]
        todo = [item for item in items if item not in results or results[item].figures is None]

        def start() -> Child:
            child = Child([*command, "--tiny"] if options.tiny else command)
            if others := {result.machine for result in results.values()} - {child.machine}:
                child.close()
                parser.error(f"--out: {options.out} holds results of {others.pop()}, not of {child.machine}")
            return child

        finished = measure_all(todo, start, keep, options.limit_s, options.item_s)
    chosen = [results[item] for item in items if item in results]
    if options.json:
        print(msgspec.json.encode({"finished": finished, "results": chosen}).decode())
    else:
        print("\n".join(in_words(result) for result in chosen))
    print(f"h200: {len(chosen)} of {len(items)} measured", file=sys.stderr)
    return 0 if finished and all(result.figures is not None for result in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
