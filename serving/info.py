"""`loong info`: what of a model fits onto which devices, by arithmetic; neither JAX nor a device is needed.

What it is not: a compile for that machine (`scripts/aot.py`), or a measurement (`loong profile`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from loong_jax.config import ConfigError, ModelConfig
from loong_jax.cost.hardware import HARDWARE
from loong_jax.cost.memory import Fit, Topology, fits, suggested, topology_of
from loong_jax.cost.presets import MODELS
from loong_jax.model.hf_config import read_config
from serving.flags import dtype_of

TABLE_WIDTH = 120  # where there is no terminal
_GIB = float(1 << 30)

Model = Annotated[
    str,
    typer.Argument(help=f"Folder of a checkpoint, of which config.json is read, or {', '.join(MODELS)}."),
]
TopologyText = Annotated[
    str,
    typer.Option(
        "--topology",
        help=f"Devices, as KIND:CHIPS: v5e:2x4, v5p:2x2x1, H200:8. Kinds: {', '.join(HARDWARE)}.",
        show_default=False,
    ),
]
Tp = Annotated[
    int | None, typer.Option(help="Only this many devices an instance. Default: all that are possible.", min=1)
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.")]
MemoryShare = Annotated[
    float, typer.Option(help="Share of a device's memory for weights and KV; the rest is for programs.")
]
Json = Annotated[bool, typer.Option("--json", help="A flag: print JSON.")]


def info(
    model: Model,
    topology: TopologyText,
    tp: Tp = None,
    dtype: Dtype = "auto",
    memory_share: MemoryShare = 0.9,
    json: Json = False,
) -> None:
    """Tell what fits: weights and KV of a model on given devices, for each number of devices an instance may have.

    By arithmetic, before any device is at hand. KV is in tokens, of one instance and of all: a request may spread over
    all of them.
    """
    if not 0 < memory_share <= 1:
        raise ConfigError(f"memory-share: {memory_share:g} is not above 0 and at most 1")
    config, where = _model(model, dtype), topology_of(topology)
    found = [fit for fit in fits(config, where, memory_share) if tp in (None, fit.tp)]
    if not found:
        raise ConfigError(f"tp: {tp} does not divide {where.num_devices} devices")
    best = suggested(found, config.context_length)
    if json:
        Console(soft_wrap=True).print_json(msgspec.json.encode(_report(config, where, found, best)).decode())
    else:
        _show(model, config, where, found, best)
    if best is None:
        raise ConfigError(f"topology: {found[-1].problem} into {topology}")


def _model(text: str, dtype: str) -> ModelConfig:
    wanted = dtype_of(dtype)
    if Path(text).is_dir():
        config = read_config(text)
    elif text in MODELS:
        config = MODELS[text]
    else:
        raise ConfigError(f"model: {text!r} is no folder here, and none of {', '.join(MODELS)}")
    return config if wanted is None else msgspec.structs.replace(config, dtype=wanted)


def _report(config: ModelConfig, where: Topology, found: list[Fit], best: Fit | None) -> dict[str, Any]:
    rows = [fit._asdict() | {"instance_tokens": fit.instance_tokens, "pool_tokens": fit.pool_tokens} for fit in found]
    return {
        "hardware": where.hardware.name,
        "devices": where.num_devices,
        "device_bytes": where.hardware.hbm_bytes,
        "context_tokens": config.context_length,
        "dtype": config.dtype,
        "fits": rows,
        "suggested_tp": None if best is None else best.tp,
    }


def _show(name: str, config: ModelConfig, where: Topology, found: list[Fit], best: Fit | None) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    title = f"{name} ({config.dtype}, context {config.context_length:,}) on {where.num_devices} x {where.hardware.name}"
    table = Table(title=f"{title} of {where.hardware.hbm_bytes / _GIB:.0f} GiB")
    for heading in ("tp", "instances", "DoP", "weights GiB", "KV GiB", "tokens each", "tokens in all", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fit in found:
        head = (f"{fit.tp}{' *' if fit is best else ''}", str(fit.instances))
        if fit.problem:
            table.add_row(*head, "", f"{fit.weight_bytes / _GIB:.1f}" if fit.weight_bytes else "", "", fit.problem)
            continue
        times = fit.pool_tokens / config.context_length
        table.add_row(
            *head,
            ",".join(map(str, fit.dops)),
            f"{fit.weight_bytes / _GIB:.1f}",
            f"{fit.room_bytes / _GIB:.1f}",
            f"{fit.instance_tokens:,}",
            f"{fit.pool_tokens:,}",
            f"{times:.1f} times" if times >= 1 else f"{times:.0%} of it",
        )
    console.print(table)
    console.print("GiB are of one device. KV tokens: of one instance, and of all, over which a request may spread.")
    if best is not None:
        words = f"* loong serve {name} --instances {best.instances} --tp {best.tp} --pool-tokens {best.pool_tokens}"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
