"""`loong profile`: an engine is built, its batches measured, the fit written and shown.

What it is not: the batches and the fit (`loong_jax/cost/profile.py`), or how one is measured (`serving/measuring.py`).
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

import loong_jax
from loong_jax.config import ConfigError
from loong_jax.cost.file import FORMAT, CostFile, MeasuredBatch, write_cost
from loong_jax.cost.profile import LONGEST, Fit, Measurement, batches, fitted
from loong_jax.cost.roofline import shape_of
from serving import engine as engines
from serving.engine import EngineConfig, LocalExecutor
from serving.launch import Reporter
from serving.measuring import Measurer, programs

TABLE_WIDTH = 100  # where there is no terminal


def profile(directory: Path, config: EngineConfig, out: Path, cache_dir: Path | None, reporter: Reporter) -> None:
    """Raises CheckpointError, ConfigError, OSError and ProfilingError."""
    if not out.parent.is_dir():
        raise ConfigError(f"out: there is no folder {str(out.parent)!r}")
    model = engines.read_model(directory, config.dtype)
    config = engines.for_model(config, model)
    cluster = config.cluster
    measurer = Measurer(cluster, model.vocab_size)
    reporter.say(f"loading {directory}")
    loaded = engines.load(
        directory, config, model, measurer.post, cache_dir=cache_dir, progress=reporter.progress("loading")
    )
    executor = LocalExecutor(loaded)
    try:
        wanted = programs(cluster)
        loaded.programs.warm_up(wanted, reporter.progress("compiling"))
        measurer.start(executor, wanted)
        chosen = batches(cluster, min(LONGEST, model.context_length))
        measured = measurer.measure(chosen, reporter.progress(f"measuring {len(chosen)} batches"))
    finally:
        executor.close()
    found = fitted(measured, cluster.ladder)
    cost = CostFile(
        format=FORMAT,
        loong=loong_jax.__version__,
        hardware=engines.devices_in_words(cluster.num_instances * cluster.tp),
        shape=shape_of(model),
        tp=cluster.tp,
        ladder=cluster.ladder,
        coefficients=found.coefficients,
        measured=tuple(
            MeasuredBatch(m.batch, m.seconds, error) for m, error in zip(measured, found.errors, strict=True)
        ),
    )
    write_cost(out, cost)
    console = Console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table(measured, found))
    reporter.say(f"wrote {out}")


def table(measured: list[Measurement], found: Fit) -> Table:
    out = Table("DoP", "batch", "ms", "fit", "left out", title="Measured, and what fits say with it and without it")
    for m, error, left_out in zip(measured, found.errors, found.left_out, strict=True):
        out.add_row(str(m.batch.dop), m.batch.name, f"{1e3 * m.seconds:.2f}", _percent(error), _percent(left_out))
    for phase in ("prefill", "decode"):
        chosen = [i for i, m in enumerate(measured) if m.batch.phase == phase]
        means = [_mean([errors[i] for i in chosen]) for errors in (found.errors, found.left_out)]
        out.add_row("", f"{phase}, mean size of the error", "", *(f"{100 * mean:.1f}%" for mean in means))
    return out


def _percent(error: float) -> str:
    return f"{100 * error:+.1f}%" if error == error else "-"


def _mean(errors: list[float]) -> float:
    sizes = [abs(error) for error in errors if error == error]
    return sum(sizes) / len(sizes) if sizes else float("nan")
