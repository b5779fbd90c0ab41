"""`loong simulate`: policies against workloads on a virtual clock, with progress, a table, JSON and pictures.

What it is not: the simulator (`loong_jax/sim`), or a server: nothing here needs JAX or a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loong_jax.config import ConfigError
from loong_jax.cost.hardware import HARDWARE
from loong_jax.cost.presets import MODELS
from loong_jax.policy import POLICIES
from loong_jax.sim import Result, make_workload, run
from loong_jax.sim.picture import draw_sweep, draw_timeline
from loong_jax.sim.report import report, sweep
from loong_jax.sim.setups import PolicySpec, Setup, bounds_of, make_config, parse_policy
from loong_jax.sim.trace import chrome_trace
from loong_jax.sim.workloads import ARRIVALS, NAMES, TRACES, Workload

MAX_RUNS = 1000
TABLE_WIDTH = 130  # where there is no terminal

Hardware = Annotated[str, typer.Option(help=f"Devices: {', '.join(HARDWARE)}.")]
Model = Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(MODELS)}.")]
Instances = Annotated[int, typer.Option(min=1, max=64, help="Instances, each with a copy of the weights.")]
Tp = Annotated[int, typer.Option(min=1, help="Devices of an instance.")]
WorkloadName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(NAMES)}; with --traces: {', '.join(TRACES)}. '+1m' behind it: 1% of million-token prompts."
    ),
]
PolicyText = Annotated[
    str, typer.Option(help=f"{', '.join(POLICIES)}; NAME@INSTANCESxTP: on other instances of the same devices.")
]
Policies = Annotated[str | None, typer.Option(help="Several policies, as in a,b@1x8: a sweep.", show_default=False)]
Rate = Annotated[float, typer.Option(help="Requests per second.")]
Rates = Annotated[str | None, typer.Option(help="Several rates, as in 0.5,1,1.5: a sweep.", show_default=False)]
NumRequests = Annotated[int, typer.Option(min=1, help="Requests of a run.")]
Seed = Annotated[int, typer.Option(help="Of lengths and arrivals. The same seed gives the same result.")]
Arrivals = Annotated[str, typer.Option(help=f"{', '.join(ARRIVALS)} (the trace's own times, scaled).")]
Traces = Annotated[Path | None, typer.Option(help="Folder of trace files.", show_default=False)]
PoolTokens = Annotated[int, typer.Option(min=0, help="KV of an instance, in tokens; 0: what its memory holds.")]
PageTokens = Annotated[int, typer.Option(min=1, help="Tokens of a page.")]
ChunkTokens = Annotated[
    int, typer.Option(min=0, help="New tokens of one prefill step over its group; 0: what suits the policy.")
]
MaxRunning = Annotated[int, typer.Option(min=1, help="Requests running at once.")]
Json = Annotated[Path | None, typer.Option("--json", help="File for the results.", show_default=False)]
Plot = Annotated[Path | None, typer.Option(help="PNG: SLO attainment by rate and length.", show_default=False)]
Timeline = Annotated[Path | None, typer.Option(help="PNG: who ran where over time (one run).", show_default=False)]
Trace = Annotated[Path | None, typer.Option(help="Chrome trace of the steps (one run).", show_default=False)]


def simulate(
    hardware: Hardware = "A800",
    model: Model = "lwm-7b",
    instances: Instances = 4,
    tp: Tp = 2,
    workload: WorkloadName = "zipf-1.0",
    policy: PolicyText = "elastic",
    policies: Policies = None,
    rate: Rate = 1.0,
    rates: Rates = None,
    num_requests: NumRequests = 1000,
    seed: Seed = 0,
    arrivals: Arrivals = "poisson",
    traces: Traces = None,
    pool_tokens: PoolTokens = 0,
    page_tokens: PageTokens = 16,
    chunk_tokens: ChunkTokens = 0,
    max_running: MaxRunning = 1024,
    json: Json = None,
    plot: Plot = None,
    timeline: Timeline = None,
    trace: Trace = None,
) -> None:
    """Simulate policies: the unchanged manager on a virtual clock, steps as long as the cost model says.

    Same seed, same result. Latencies are judged by the paper's SLO: TTFT within 25 times that of the prompt alone or
    15 s, TPOT within 50 ms.
    """
    setup = Setup(
        hardware=hardware, model=model, instances=instances, tp=tp, pool_tokens=pool_tokens, page_tokens=page_tokens,
        chunk_tokens=chunk_tokens, max_running=max_running,
    )  # fmt: skip
    specs = [parse_policy(text, setup) for text in (policies or policy).split(",")]
    tried = _rates(rates, rate)
    single = len(specs) * len(tried) == 1
    if not single and (timeline or trace):
        raise ConfigError("timeline, trace: are of one run; give one policy and one rate")
    if len(specs) * len(tried) > MAX_RUNS:
        raise ConfigError(f"rates: {len(specs) * len(tried)} runs are too many; at most {MAX_RUNS}")
    made = [
        make_workload(workload, rate=r, num_requests=num_requests, seed=seed, arrivals=arrivals, traces=traces)
        for r in tried
    ]
    runs, last = _run_all(setup, specs, made, seed, record=bool(timeline or trace))
    console = Console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(_table(runs))
    if json is not None:
        json.write_bytes(msgspec.json.encode(runs[0] if single else sweep(runs)))
    if plot is not None:
        draw_sweep(runs, plot)
    if timeline is not None:
        draw_timeline(last.spans, specs[0].instances, timeline)
    if trace is not None:
        trace.write_bytes(chrome_trace(last.spans, specs[0].instances))


def _rates(text: str | None, rate: float) -> list[float]:
    if text is None:
        return [rate]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"rates: {text!r} is no list of numbers such as 0.5,1,1.5") from None


def _run_all(
    setup: Setup, specs: list[PolicySpec], made: list[Workload], seed: int, *, record: bool
) -> tuple[list[dict[str, Any]], Result]:
    """The reports, policy by policy, and the last result."""
    runs: list[dict[str, Any]] = []
    bounds = bounds_of(setup, made[0])  # of the requests: the same at every rate
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with progress:
        for spec in specs:
            for workload in made:
                task = progress.add_task(f"{spec.text} at {workload.rate:g}/s", total=len(workload.requests))
                config = make_config(setup, spec, workload, record=record)
                tell = lambda done, total, task=task: progress.update(task, completed=done, total=total)
                result = run(msgspec.structs.replace(config, progress=tell))
                progress.remove_task(task)
                runs.append(report(result, policy=spec.text, workload=workload, seed=seed, bounds=bounds))
    return runs, result


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{runs[0]['workload']}, {runs[0]['num_requests']} requests, seed {runs[0]['seed']}")
    for heading in ("policy", "req/s", "SLO", "worst decile", "TTFT p50 / p99", "TPOT p50 / p99"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for heading in ("of bound", "left", "events/s", "x real"):
        table.add_column(heading, justify="right")
    for r in runs:
        ttft, tpot = r["ttft_s"], r["tpot_s"]
        table.add_row(
            r["policy"],
            f"{r['offered_rate']:.3g}",
            f"{r['slo_attainment']:.1%}",
            f"{min(r['attainment_by_decile']):.0%}",
            f"{ttft['p50']:.2f} / {ttft['p99']:.1f} s",
            f"{tpot['p50'] * 1e3:.1f} / {tpot['p99'] * 1e3:.0f} ms",
            f"{r['bound_share']:.0%}",
            str(r["num_requests"] - r["finished"]),
            f"{r['num_events'] / max(r['cpu_s'], 1e-9):,.0f}",
            f"{r['sim_s'] / max(r['cpu_s'], 1e-9):,.0f}",
        )
    return table
