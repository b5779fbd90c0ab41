"""What `loong serve` understands beside its own flags: spellings of other servers, and a file of flags.

Flags that mean the same as one of ours are declared beside it (`serving/flags.py`). Here are underscores for dashes,
`--model` for the argument, `--config FILE`, and a word on flags that others have and this server has not.
What it is not: the flags (`serving/flags.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
import typer.core

MAX_CONFIG_BYTES = 1 << 20

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "--gpu-memory-utilization": "the pool is sized in tokens: --pool-tokens; loong info tells how many fit",
        "--mem-fraction-static": "the pool is sized in tokens: --pool-tokens; loong info tells how many fit",
        "--data-parallel-size": "say how many instances there are: --instances; their groups are formed anew each step",
        "--pipeline-parallel-size": "an instance is --tp devices; there are no stages",
        "--prefill-context-parallel-size": "the degree is chosen anew each step; --dops limits which there are",
        "--decode-context-parallel-size": "the degree is chosen anew each step; --dops limits which there are",
        "-dcp": "the degree is chosen anew each step; --dops limits which there are",
        "--api-key": "keys come from a file, not from what everybody on the machine can list: --api-keys FILE",
        "--enforce-eager": "every step is compiled ahead of time; --warm-up minimal is ready soonest",
        "--skip-server-warmup": "every step is compiled ahead of time; --warm-up minimal is ready soonest",
        "--enable-prefix-caching": "there is no cache of prefixes yet",
        "--quantization": "weights are served as float32 or bfloat16: --dtype",
        "--kv-cache-dtype": "KV has the type of the weights: --dtype",
        "--load-format": "safetensors and Orbax folders are told apart by what is in them",
        "--trust-remote-code": "no code of a checkpoint is run",
        "--tokenizer": "the checkpoint's tokenizer.json is used",
        "--scheduling-policy": "see --policy",
        "--schedule-policy": "see --policy",
        "--enable-metrics": "metrics are at /metrics of --http-port",
        "--seed": "each request has a seed of its own",
    }
)
"""Flag of another server -> what to do here."""

_MODEL = ("--model", "--model-path")


class ServeCommand(typer.core.TyperCommand):
    """The command with what this module adds to its arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, respelled(args))


def respelled(args: Sequence[str]) -> list[str]:
    """The arguments with dashes in names of flags, and the model as an argument. Raises typer.BadParameter for flags of
    others that have no equal here."""
    out: list[str] = []
    positional: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        hint = HINTS.get(name.replace("--no-", "--", 1) if name.startswith("--no-") else name)
        if hint is not None:
            raise typer.BadParameter(f"{name} is not known here: {hint}")
        if name in _MODEL:
            if not equals and not rest:
                raise typer.BadParameter(f"{name} needs a folder")
            positional.append(value if equals else rest.pop(0))
        else:
            out.append(name + equals + value)
    return [*out, "--", *positional] if positional else out


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the flags of a TOML file become the command's defaults. Raises typer.BadParameter, which
    names the file and the key."""
    if path is None or ctx.resilient_parsing:
        return None
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise typer.BadParameter(f"{path}: has more than {MAX_CONFIG_BYTES} bytes")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path}: is no TOML: {error}") from None
    names = {_bare(spelling): parameter.name for parameter in ctx.command.params for spelling in parameter.opts}
    names |= {"model": "model", "model-path": "model"}
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = names.get(key.replace("_", "-"))
        if name is None or name in ("config", "help"):
            hint = HINTS.get("--" + key.replace("_", "-"), "there is no such flag")
            raise typer.BadParameter(f"{path}: {key}: {hint}")
        if name in defaults:
            raise typer.BadParameter(f"{path}: {key}: is given twice, in two spellings")
        defaults[name] = _value(path, key, value)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _bare(spelling: str) -> str:
    return spelling.lstrip("-").replace("_", "-")


def _value(path: Path, key: str, value: Any) -> Any:
    """As the command line would give it, so that it is checked alike; a list of integers is one with commas."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        return str(value)
    raise typer.BadParameter(f"{path}: {key}: {value!r} is no value of a flag")


Config = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of flags: a line NAME = VALUE each, with the names of this list. The command line goes before "
        "it. Default: none.",
        callback=read_config,
        is_eager=True,
    ),
]
