"""The flags of `loong bench`: help, units, and how their values are read.

What it is not: the command (`serving/bench/command.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loong_jax.config import ConfigError
from serving.bench.arrivals import RAMPS
from serving.bench.backends import NAMES
from serving.bench.prompts import MAX_PROMPT_TOKENS
from serving.bench.result import METRICS

DATASETS = ("random", "sharegpt", "sonnet", "needle", "custom", "trace")
MAX_PROMPTS = 1_000_000

Objectives = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OBJECTIVE]...", help="More of --goodput, as in --goodput ttft:500 tpot:50."),
]
BackendName = Annotated[str, typer.Option(help=f"{', '.join(NAMES)}; all but grpc over HTTP.")]
Host = Annotated[str, typer.Option(help="Of the server.")]
Port = Annotated[
    int | None, typer.Option(help="Of the server. Default: 50051 for grpc, 8000 for HTTP.", min=1, max=65535)
]
BaseUrl = Annotated[str | None, typer.Option(help="URL of an HTTP server, in place of host and port. Absent: those.")]
Endpoint = Annotated[str | None, typer.Option(help="Path over HTTP. Default: /v1/completions or /v1/chat/completions.")]
Header = Annotated[list[str] | None, typer.Option(help="KEY=VALUE, sent with each request over HTTP; may be repeated.")]
ModelName = Annotated[str | None, typer.Option(help="Name of the model over HTTP. Default: the first one served.")]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder with tokenizer.json. Default: the served model's, if on this machine, or the demo model's."
    ),
]
DatasetName = Annotated[str, typer.Option(help=f"What is asked: {', '.join(DATASETS)}.")]
DatasetPath = Annotated[
    Path | None,
    typer.Option(help="File of sharegpt (JSON), custom (JSON lines), trace, or lines of sonnet. Absent: none."),
]
NumPrompts = Annotated[int, typer.Option(help="Requests.", min=1, max=MAX_PROMPTS)]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.")]
RandomInput = Annotated[int, typer.Option(help="random: tokens of a prompt.", min=1, max=MAX_PROMPT_TOKENS)]
RandomOutput = Annotated[int, typer.Option(help="random: tokens to generate.", min=1)]
RandomRange = Annotated[float, typer.Option(help="random: both lengths vary by this share, 0 to below 1.")]
RandomPrefix = Annotated[int, typer.Option(help="random: tokens that all prompts begin with, beside the rest.", min=0)]
SharegptOutput = Annotated[
    int | None,
    typer.Option(help="sharegpt: tokens to generate. Default: as many as the answer of the file has.", min=1),
]
SonnetInput = Annotated[int, typer.Option(help="sonnet: tokens of a prompt, in whole lines.", min=1)]
SonnetOutput = Annotated[int, typer.Option(help="sonnet: tokens to generate.", min=1)]
SonnetPrefix = Annotated[int, typer.Option(help="sonnet: tokens of the prompt that are the same in all.", min=0)]
NeedleInput = Annotated[str, typer.Option(help="needle: tokens of prompts, in turn, as in 500,2000.")]
NeedleOutput = Annotated[int, typer.Option(help="needle: tokens to generate; answers are judged.", min=1)]
CustomOutput = Annotated[int, typer.Option(help="custom: tokens to generate where a line does not say.", min=1)]
LengthScale = Annotated[float, typer.Option(help="trace: lengths are multiplied by this.")]
MaxTotal = Annotated[int, typer.Option(help="trace: longer requests (prompt and output) are left out; 0: none.", min=0)]
TraceSpeed = Annotated[
    float | None, typer.Option(help="trace: its own times, so many times as fast. Absent: --request-rate.")
]
RequestRate = Annotated[float, typer.Option(help="Requests per second; inf: all at once.")]
Burstiness = Annotated[float, typer.Option(help="Shape of gamma distributed gaps; 1: Poisson, below: bursts.")]
MaxConcurrency = Annotated[int | None, typer.Option(help="Most requests open at once. Absent: any number.", min=1)]
RampStrategy = Annotated[str | None, typer.Option(help=f"The rate grows: {' or '.join(RAMPS)}. Absent: it does not.")]
RampStart = Annotated[float | None, typer.Option(help="First rate of the ramp, requests per second. Absent: no ramp.")]
RampEnd = Annotated[float | None, typer.Option(help="Last rate of the ramp, requests per second. Absent: no ramp.")]
Temperature = Annotated[float, typer.Option(help="0: greedy.", min=0)]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="A flag: answers have their full length.")]
Warmups = Annotated[int, typer.Option(help="Requests before the run, not counted.", min=0, max=10_000)]
ReadyS = Annotated[
    float, typer.Option("--ready-check-timeout-sec", help="Wait for the server to be ready, in seconds.", min=0)
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(help="Objectives in milliseconds: ttft:500, tpot:50, e2el:5000; may be repeated. Absent: none."),
]
PercentileMetrics = Annotated[str, typer.Option(help=f"Latencies in the table: {', '.join(METRICS)}.")]
MetricPercentiles = Annotated[str, typer.Option(help="Percentiles of latencies, as in 50,99.9.")]
SaveResult = Annotated[bool, typer.Option("--save-result", help="A flag: write the result as JSON.")]
SaveDetailed = Annotated[
    bool, typer.Option("--save-detailed", help="A flag: with an entry for each request, and texts.")
]
ResultDir = Annotated[Path, typer.Option(help="Folder for the JSON.")]
ResultFilename = Annotated[
    str | None, typer.Option(help="Its name; implies --save-result. Default: made of backend, rate, model and date.")
]
Label = Annotated[str | None, typer.Option(help="Goes into the JSON and its name. Absent: the backend.")]
Metadata = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the JSON; may be repeated.")]
Plot = Annotated[Path | None, typer.Option(help="PNG of the run. Absent: none.")]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", "--disable-tqdm", help="A flag: nothing is shown meanwhile.")
]


def names(flag: str, text: str, allowed: Sequence[str] | dict[str, str]) -> list[str]:
    """Names with commas between. Raises ConfigError, as the others here do."""
    found = text.split(",")
    for name in found:
        if name not in allowed:
            raise ConfigError(f"{flag}: {name!r} is none of {', '.join(allowed)}")
    return found


def percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"metric-percentiles: {text!r} is no list of numbers from 0 to 100, such as 50,99.9")
    return values


def numbers(flag: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if not all(1 <= value <= MAX_PROMPT_TOKENS for value in values):
        raise ConfigError(f"{flag}: {text!r} is no list of positive integers such as 500,2000")
    return values


def pairs(flag: str, texts: Sequence[str] | None) -> dict[str, str]:
    parts = [text.partition("=") for text in texts or ()]
    for name, equals, _ in parts:
        if not name or not equals:
            raise ConfigError(f"{flag}: {name!r} is no KEY=VALUE")
    return {name: value for name, _, value in parts}
