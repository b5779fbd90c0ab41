"""`loong bench`: a server under load. Flags and result fields are those of `vllm bench serve` where they mean the same.

What it is not: the simulator (`loong simulate`), or a measurement of the engine alone (`loong profile`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from loong_jax.config import ConfigError
from loong_jax.default_model import DEFAULT_MODEL
from serving.bench import flags, picture, prompts, result
from serving.bench.arrivals import arrival_times_s, ramp_of
from serving.bench.backends import NAMES, Ask, Backend, GrpcBackend, HttpBackend
from serving.bench.prompts import Item, Span
from serving.bench.result import METRICS
from serving.bench.runner import Run, run_all
from serving.bench.traces import trace_items
from serving.bench.watch import watch
from serving.client import LoongClient
from serving.tokenizer import Tokenizer

TABLE_WIDTH = 72  # where there is no terminal


class BenchFailed(Exception):
    """Not one request succeeded."""


def bench(
    objectives: flags.Objectives = None,
    backend: flags.BackendName = "grpc",
    host: flags.Host = "127.0.0.1",
    port: flags.Port = None,
    base_url: flags.BaseUrl = None,
    endpoint: flags.Endpoint = None,
    header: flags.Header = None,
    model: flags.ModelName = None,
    tokenizer: flags.TokenizerFolder = None,
    dataset_name: flags.DatasetName = "random",
    dataset_path: flags.DatasetPath = None,
    num_prompts: flags.NumPrompts = 1000,
    seed: flags.Seed = 0,
    random_input_len: flags.RandomInput = 1024,
    random_output_len: flags.RandomOutput = 128,
    random_range_ratio: flags.RandomRange = 0.0,
    random_prefix_len: flags.RandomPrefix = 0,
    sharegpt_output_len: flags.SharegptOutput = None,
    sonnet_input_len: flags.SonnetInput = 550,
    sonnet_output_len: flags.SonnetOutput = 150,
    sonnet_prefix_len: flags.SonnetPrefix = 200,
    needle_input_len: flags.NeedleInput = "500,2000",
    needle_output_len: flags.NeedleOutput = 8,
    custom_output_len: flags.CustomOutput = 256,
    length_scale: flags.LengthScale = 1.0,
    max_total_len: flags.MaxTotal = 0,
    trace_speed: flags.TraceSpeed = None,
    request_rate: flags.RequestRate = math.inf,
    burstiness: flags.Burstiness = 1.0,
    max_concurrency: flags.MaxConcurrency = None,
    ramp_up_strategy: flags.RampStrategy = None,
    ramp_up_start_rps: flags.RampStart = None,
    ramp_up_end_rps: flags.RampEnd = None,
    temperature: flags.Temperature = 0.0,
    ignore_eos: flags.IgnoreEos = False,
    num_warmups: flags.Warmups = 0,
    ready_s: flags.ReadyS = 60.0,
    goodput: flags.Goodput = None,
    percentile_metrics: flags.PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: flags.MetricPercentiles = "50,90,99",
    save_result: flags.SaveResult = False,
    save_detailed: flags.SaveDetailed = False,
    result_dir: flags.ResultDir = Path("."),
    result_filename: flags.ResultFilename = None,
    label: flags.Label = None,
    metadata: flags.Metadata = None,
    plot: flags.Plot = None,
    no_progress: flags.NoProgress = False,
) -> None:
    """Put a server under load and tell its throughput and latencies.

    Prints a table; --save-result writes the JSON of `vllm bench serve`, --plot a picture. Interrupted, it tells of the
    requests that were done.
    """
    given = dict(locals())
    asyncio.run(_Bench(given).run())


class _Bench:
    """One run of the command; `given` are its arguments by name."""

    def __init__(self, given: dict[str, Any]) -> None:
        """Raises ConfigError for flags that make no sense, before anything is sent."""
        self._given = given
        self._console = Console(stderr=True)
        self._objectives_ms = result.objectives_of((*(given["goodput"] or ()), *(given["objectives"] or ())))
        if given["objectives"] and not given["goodput"]:
            raise ConfigError(f"goodput: {given['objectives'][0]!r} stands alone; objectives follow --goodput")
        self._metrics = flags.names("percentile-metrics", given["percentile_metrics"], METRICS)
        self._percentiles = flags.percentiles(given["metric_percentiles"])
        self._metadata = flags.pairs("metadata", given["metadata"])
        self._headers = flags.pairs("header", given["header"])
        flags.names("backend", given["backend"], NAMES)
        flags.names("dataset-name", given["dataset_name"], flags.DATASETS)
        self._ramp = ramp_of(given["ramp_up_strategy"], given["ramp_up_start_rps"], given["ramp_up_end_rps"])
        arrival_times_s(1, given["request_rate"], given["burstiness"], self._ramp, 0)
        self._check_paths()

    def _check_paths(self) -> None:
        given = self._given
        if given["dataset_path"] is None and given["dataset_name"] in ("sharegpt", "custom", "trace"):
            raise ConfigError(f"dataset-path: {given['dataset_name']} is read from a file")
        if given["dataset_path"] is not None and given["dataset_name"] in ("random", "needle"):
            raise ConfigError(f"dataset-path: {given['dataset_name']} reads no file")
        if not 0 <= given["random_range_ratio"] < 1:
            raise ConfigError(f"random-range-ratio: {given['random_range_ratio']:g} is not from 0 to below 1")
        if not 0 < given["length_scale"] < math.inf:
            raise ConfigError(f"length-scale: {given['length_scale']:g} is not positive")
        if given["trace_speed"] is not None and not (
            0 < given["trace_speed"] < math.inf and given["dataset_name"] == "trace"
        ):
            raise ConfigError("trace-speed: must be positive, and goes with --dataset-name trace")
        for path in (given["plot"], given["result_dir"] / (given["result_filename"] or "x")):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{path.absolute().parent}: there is no such folder for a result")
        if given["backend"] == "grpc":
            for flag in ("base_url", "endpoint", "header"):
                if given[flag]:
                    raise ConfigError(f"{flag.replace('_', '-')}: goes with HTTP, and --backend is grpc")

    async def run(self) -> None:
        """Raises ConfigError, OSError, TimeoutError, BenchFailed, and what reading a tokenizer raises."""
        given = self._given
        async with contextlib.AsyncExitStack() as stack:
            backend = await stack.enter_async_context(self._backend())
            await backend.wait_ready(given["ready_s"])
            folder = given["tokenizer"] or _folder_of(backend)
            self._console.print(f"tokenizer: {folder}", markup=False, highlight=False)
            items = await asyncio.to_thread(self._items, _tokenizer(folder))
            await self._warm_up(backend, items)
            run = Run(items)
            await self._measure(run, backend)
            self._tell(run, self._result(run, backend, folder))

    def _backend(self) -> Backend:
        given = self._given
        chat = given["backend"] == "openai-chat"
        ask = Ask(given["temperature"], given["ignore_eos"], given["model"], chat)
        if given["backend"] == "grpc":
            return GrpcBackend(LoongClient(f"{given['host']}:{given['port'] or 50051}"), ask)
        url = given["base_url"] or f"http://{given['host']}:{given['port'] or 8000}"
        endpoint = given["endpoint"] or ("/v1/chat/completions" if chat else "/v1/completions")
        return HttpBackend(url, endpoint, self._headers, ask)

    def _items(self, tokenizer: Tokenizer) -> list[Item]:
        items = self._drawn(tokenizer)
        if self._given["backend"] != "openai-chat":
            return items
        texts = [x.prompt if isinstance(x.prompt, str) else tokenizer.decode(x.prompt) for x in items]
        return [item._replace(prompt=text) for item, text in zip(items, texts, strict=True)]

    def _drawn(self, tokenizer: Tokenizer) -> list[Item]:
        given = self._given
        path, num, seed = given["dataset_path"], given["num_prompts"], given["seed"]
        match given["dataset_name"]:
            case "random":
                ratio = given["random_range_ratio"]
                lengths = Span(given["random_input_len"], ratio), Span(given["random_output_len"], ratio)
                return prompts.random_items(tokenizer, num, seed, *lengths, given["random_prefix_len"])
            case "sharegpt":
                return prompts.sharegpt_items(path, tokenizer, num, seed, given["sharegpt_output_len"])
            case "sonnet":
                sizes = given["sonnet_input_len"], given["sonnet_output_len"], given["sonnet_prefix_len"]
                return prompts.sonnet_items(path, tokenizer, num, seed, *sizes)
            case "needle":
                sizes = flags.numbers("needle-input-len", given["needle_input_len"])
                return prompts.needle_items(tokenizer, num, seed, sizes, given["needle_output_len"])
            case "custom":
                return prompts.custom_items(path, tokenizer, num, given["custom_output_len"])
            case _:
                scale, most = given["length_scale"], given["max_total_len"]
                return trace_items(path, tokenizer, num, seed, length_scale=scale, max_total_tokens=most)

    def _arrivals_s(self, items: Sequence[Item]) -> list[float]:
        given = self._given
        if given["trace_speed"] is None:
            return arrival_times_s(len(items), given["request_rate"], given["burstiness"], self._ramp, given["seed"])
        if items[0].arrival_s is None:
            raise ConfigError("trace-speed: this trace has no times; give --request-rate")
        return [(item.arrival_s or 0.0) / given["trace_speed"] for item in items]

    async def _warm_up(self, backend: Backend, items: Sequence[Item]) -> None:
        num = self._given["num_warmups"]
        if num:
            run = Run([items[i % len(items)] for i in range(num)])
            await run_all(run, backend, [0.0] * num, self._given["max_concurrency"])
            self._console.print(f"{num} warm-up requests done", highlight=False)

    async def _measure(self, run: Run, backend: Backend) -> None:
        """An interrupt ends the run, not the command."""
        arrivals_s = self._arrivals_s(run.items)
        running = asyncio.ensure_future(run_all(run, backend, arrivals_s, self._given["max_concurrency"]))
        asyncio_loop = asyncio.get_running_loop()
        asyncio_loop.add_signal_handler(signal.SIGINT, running.cancel)
        watching = None if self._given["no_progress"] else asyncio.ensure_future(watch(run, self._console))
        try:
            await running
        finally:
            asyncio_loop.remove_signal_handler(signal.SIGINT)
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    def _result(self, run: Run, backend: Backend, folder: Path) -> dict[str, Any]:
        given = self._given
        model = (backend.model if isinstance(backend, HttpBackend) else given["model"]) or folder.name
        head: dict[str, Any] = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": given["backend"],
            "backend": given["backend"],
            "label": given["label"],
            "model_id": model,
            "tokenizer_id": str(folder),
            "dataset": given["dataset_name"],
            "num_prompts": len(run.items),
            **self._metadata,
            "request_rate": given["request_rate"] if given["request_rate"] < math.inf else "inf",
            "burstiness": given["burstiness"],
            "max_concurrency": given["max_concurrency"],
        }
        if self._ramp is not None:
            names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
            head |= dict(zip(names, self._ramp, strict=True))
        return head | result.summary(run, objectives_ms=self._objectives_ms, percentiles=self._percentiles)

    def _tell(self, run: Run, found: dict[str, Any]) -> None:
        given, console = self._given, Console()
        console = console if console.is_terminal else Console(width=TABLE_WIDTH)
        console.print(result.table(found, self._metrics, self._percentiles))
        for error, count in _most_common(found["errors"]):
            self._console.print(f"failed {count} times: {error}", markup=False, highlight=False)
        if given["save_result"] or given["save_detailed"] or given["result_filename"]:
            path = given["result_dir"] / (given["result_filename"] or _file_name(found))
            kept = {k: v for k, v in found.items() if given["save_detailed"] or k not in result.DETAILS}
            path.write_bytes(msgspec.json.encode(kept))
            self._console.print(f"wrote {path}", markup=False, highlight=False)
        if given["plot"] is not None:
            picture.draw(run, found, self._objectives_ms, given["plot"])
            self._console.print(f"wrote {given['plot']}", markup=False, highlight=False)
        if not found["completed"]:
            raise BenchFailed("not one request succeeded")


def _folder_of(backend: Backend) -> Path:
    """The served model's, where the server says which and it is on this machine."""
    root = backend.model_root if isinstance(backend, HttpBackend) else None
    return Path(root) if root and (Path(root) / "tokenizer.json").is_file() else DEFAULT_MODEL


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {folder} has no tokenizer.json")
    return tokenizer


def _file_name(found: dict[str, Any]) -> str:
    most = f"-concurrency{found['max_concurrency']}" if found["max_concurrency"] else ""
    model = re.sub(r"[^\w.-]", "_", str(found["model_id"]).split("/")[-1])
    return f"{found['label'] or found['backend']}-{found['request_rate']}qps{most}-{model}-{found['date']}.json"


def _most_common(errors: Sequence[str], most: int = 5) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for error in errors:
        if error:
            counts[error] = counts.get(error, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])[:most]
