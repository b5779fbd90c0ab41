"""Whole models on slices that could hold them: compiles their steps and writes docs/sizing.md.

    scripts/sizing.py                compiles what out/sizing lacks, one step after the other, and writes the page
    scripts/sizing.py --only NAME    one row of `ROWS`, as in llama-3-8b:v5e:2x4
    scripts/sizing.py --page         only writes the page, from what is there

Each row is a run of scripts/aot.py, whose answer is kept in out/sizing. A compile takes a minute of a core and up to
3 GB. What it is not: the choice of a slice for you; scripts/aot.py compiles any other.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import aot
import msgspec

from loong_jax.aot.report import GIB, StepReport

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "sizing.md"
RESULTS = ROOT / "out" / "sizing"


class Row(NamedTuple):
    model: str
    topology: str
    dop: int
    tp: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.model}:{self.topology}:{self.context >> 10}K"

    @property
    def words(self) -> list[str]:
        fields = self._asdict().items()
        return [word for name, value in fields for word in (f"--{name}", str(value))] + ["--steps", "prefill,decode"]

    @property
    def result(self) -> Path:
        return RESULTS / (self.name.replace(":", "_") + ".json")


K = 1 << 10
ROWS = (
    Row("llama-3-8b", "v5e:2x4", 4, 2, 128 * K),
    Row("llama-3-8b", "v5p:2x2x2", 4, 2, 1024 * K),
    Row("llama-2-7b", "v5e:2x4", 2, 4, 128 * K),
    Row("llama-2-7b", "v6e:8x8", 16, 4, 1024 * K),
    Row("qwen3-32b", "v6e:2x4", 2, 4, 128 * K),
    Row("qwen3-32b", "tpu7x:2x2x2", 4, 4, 1024 * K),
    Row("llama-3-70b", "v5p:2x2x2", 2, 4, 128 * K),
    Row("llama-3-70b", "tpu7x:2x2x2", 4, 4, 1024 * K),
    Row("llama-3-8b", "v5e:8x8", 16, 4, 1024 * K),
)


def compile_row(row: Row) -> None:
    """In a process of its own: libtpu ends a process on some errors."""
    print(f"sizing: {row.name}", flush=True)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "aot.py", *row.words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    row.result.write_text(done.stdout.splitlines()[-1])


def compile_table(script: str) -> None:
    """What a script prints as a table."""
    command = [sys.executable, ROOT / "scripts" / f"{script}.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    table_of(script).write_text("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")) + "\n")


def table_of(script: str) -> Path:
    return RESULTS / f"{script}.md"


def page(rows: Iterable[Row]) -> str:
    results = {
        row: msgspec.json.decode(row.result.read_bytes(), type=aot.Result) for row in rows if row.result.exists()
    }
    missing = [row.name for row in rows if row not in results]
    out = [HEAD]
    out += table(
        (
            "model",
            "slice",
            "context",
            "DoP x tp",
            "weights",
            "pool",
            "other",
            "temp",
            "all",
            "left",
            "tokens of KV that fit",
        ),
        [memory_line(row, result) for row, result in results.items()],
    )
    out.append(COLLECTIVES)
    out += table(
        ("model, slice", "step", "compile", "ring", "exchange", "over tp", "VMEM", "products"),
        [step_line(row, step) for row, result in results.items() for step in result.steps],
    )
    if missing:
        out.append(f"\nNot compiled yet: {', '.join(missing)}.")
    text = "\n".join(out) + "\n"
    for script, words in TABLES.items():
        known = table_of(script).read_text() if table_of(script).exists() else "Not compiled yet.\n"
        text += words.format(table=known)
    return text


HEAD = """# Whole models on slices, by the compiler

Nothing here ran on a TPU: these are figures of the real compiler (libtpu, on a CPU). `scripts/sizing.py` compiled each
row and wrote this page; `scripts/aot.py --topology ... --model ... --dop ... --tp ... --context ...` does others.

GiB of one device, of the step that needs most; prefill chunks of 8,192 tokens over the group, decode of 32 rows for
each master. *Left* is of the published memory. *Fit*: tokens on all instances of the slice if what is left held KV.
"""

COLLECTIVES = """
What a step sends, in bytes of results on one device: *overlapped* transfers have a kernel or a matrix product between
their start and their end, *sync* ones nothing. A ring of context sends as much again for each tile of it, and so do
gathered queries. Compile: seconds of CPU, tracing included. Products: of one device, without kernels.
"""

RINGS = """
## Rings and slices

On v5e slices of more than 16 chips XLA makes the permutes of a ring synchronous when it follows JAX's order of devices.
Along neighbours they are asynchronous, so instances are numbered along a closed cycle through the slice's tiles
(`loong_jax/esp/ring_order.py`). `scripts/ring_orders.py` made this table:

{table}
**v5e slices of more than 16 chips run no group that is a part of the slice:** the compiler refuses every program that
is not over all devices ("on platforms with limited ICI routing device assignment should include all slice devices").
So elastic groups on v5e want slices of up to 16 chips; a larger one serves one group of all its instances.
"""

EXCHANGE = """
## What the exchange of decode waits for

In decode the gather of queries and the return of partials are synchronous, although attention to the master's own rows
needs nothing of them. XLA for TPU makes the gather asynchronous first (an attribute
`async_collective_name="all-gather-start"` is left of it) and turns it back when it has placed nothing between start and
end: kernels it does not let run meanwhile, whatever it is told. `scripts/exchange_forms.py` made this table:

{table}
Permutes to each other instance would run behind the kernel, but there are DoP - 1 of them, each way, in each layer. Two
collectives a layer are kept: what a decode step pays for is the number of its messages, not their bytes.
"""

TABLES = {"ring_orders": RINGS, "exchange_forms": EXCHANGE}


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines)]


def memory_line(row: Row, result: aot.Result) -> tuple[str, ...]:
    most = max((step.memory for step in result.steps), key=lambda memory: memory.total_bytes)
    temp = most.temp_bytes + most.code_bytes + most.output_bytes
    sizes = (most.weight_bytes, most.pool_bytes, most.other_bytes, temp, most.total_bytes, result.room.free_bytes)
    return (
        row.model,
        row.topology,
        f"{row.context >> 10}K",
        f"{row.dop} x {row.tp}",
        *(f"{size / GIB:.2f}" for size in sizes),
        f"{result.room.machine_tokens:,}",
    )


def step_line(row: Row, step: StepReport) -> tuple[str, ...]:
    def sent(*, axis: str, permutes: bool) -> str:
        found = [one for one in step.collectives if one.axis == axis and (one.kind == "collective-permute") == permutes]
        parts = {one.form: sum(o.num_bytes for o in found if o.form == one.form) for one in found}
        return ", ".join(f"{form} {size / 2**20:.0f} MiB" for form, size in sorted(parts.items())) or "-"

    return (
        f"{row.model}, {row.topology}, {row.context >> 10}K",
        step.phase,
        f"{step.lower_s + step.compile_s:.0f} s",
        sent(axis="sp", permutes=True),
        sent(axis="sp", permutes=False),
        sent(axis="tp", permutes=False),
        f"{step.vmem_bytes / 2**20:.1f} of {step.vmem_limit_bytes / 2**20:.0f} MiB",
        f"{step.matmul_flops / 1e12:.2f} TFLOP",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="the name of one row")
    parser.add_argument("--page", action="store_true", help="compile nothing")
    options = parser.parse_args()
    names = [row.name for row in ROWS]
    if options.only is not None and options.only not in names:
        print(f"sizing: only: {options.only!r} is none of {', '.join(names)}", file=sys.stderr)
        return 2
    os.nice(5)
    for row in ROWS:
        if not options.page and not row.result.exists() and options.only in (None, row.name):
            compile_row(row)
    for script in TABLES:
        if not options.page and not table_of(script).exists() and options.only is None:
            compile_table(script)
    results = [row.result for row in ROWS] + [table_of(script) for script in TABLES]
    missing = [path.name for path in results if not path.exists()]
    if missing:
        print(f"sizing: {PAGE.name} stays as it is, for it would lose {', '.join(missing)}", file=sys.stderr)
        return 0 if options.only else 1
    PAGE.write_text(page(ROWS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
