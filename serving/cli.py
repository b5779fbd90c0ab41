"""The `loong` command: what a person types and reads. The only place that touches the environment.

What it is not: the life cycle behind a command (`serving/launch.py`) or the list of flags (`serving/flags.py`).
Importing it does not import JAX: the platform is chosen first.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from loong_jax.config import LimitsConfig
from loong_jax.default_model import DEFAULT_MODEL
from serving import access_flags, flags, launch
from serving.bench.command import bench as bench_command
from serving.client import ClientIdentity, LoongClient, chat_messages, generate_request
from serving.console import ConsoleReporter
from serving.conversation import talk
from serving.engine import EngineConfig
from serving.info import info as info_command
from serving.launch import LaunchConfig
from serving.printer import Printer, summary
from serving.profile import profile as profile_engine
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.server import ServerConfig
from serving.simulate import simulate as simulate_command
from serving.spellings import Config, ServeCommand
from serving.told_errors import fail, told_errors

T = TypeVar("T")

app = typer.Typer(
    name="loong",
    help="Serve long-context LLMs with elastic sequence parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

XLA_CPU_FLAGS = {
    # Many device threads on few cores: a slow rank must not end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": "120",
}


def main() -> None:
    app()


@app.command(cls=ServeCommand)
def serve(
    model: flags.Model = DEFAULT_MODEL,
    config: Config = None,
    instances: flags.Instances = 8,
    tp: flags.Tp = 1,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 50051,
    http_port: flags.HttpPort = 0,
    served_model_name: flags.ServedModelName = None,
    dtype: flags.Dtype = "auto",
    pool_tokens: flags.PoolTokens = 65536,
    page_tokens: flags.PageTokens = 16,
    ring_tokens: flags.RingTokens = 512,
    max_running: flags.MaxRunning = 256,
    max_waiting: flags.MaxWaiting = 1024,
    chunk_tokens: flags.ChunkTokens = 8192,
    max_model_len: flags.MaxModelLen = None,
    dops: flags.Dops = "auto",
    prefill_buckets: flags.PrefillBuckets = "auto",
    decode_buckets: flags.DecodeBuckets = "auto",
    attention: flags.Attention = "pallas",
    kernel_sizes: flags.KernelSizes = None,
    warm_up: flags.WarmUp = "minimal",
    policy: flags.PolicyName = "elastic",
    platform: flags.Platform = "default",
    cache_dir: flags.CacheDir = "~/.cache/loong",
    event_log: flags.EventLog = None,
    cost: flags.CostPath = None,
    refit: flags.Refit = "auto",
    drain_s: flags.DrainS = 30.0,
    stall_s: flags.StallS = 60.0,
    profile_dir: flags.ProfileDir = None,
    api_keys: access_flags.ApiKeys = None,
    key_requests_per_s: access_flags.KeyRequestsPerS = 0.0,
    key_streams: access_flags.KeyStreams = 0,
    tls_cert: access_flags.TlsCert = None,
    tls_key: access_flags.TlsKey = None,
    tls_client_ca: access_flags.TlsClientCa = None,
    allow_anyone: access_flags.AllowAnyone = False,
    log_format: flags.LogFormat = "text",
    log_level: flags.LogLevel = "info",
    otlp_traces_endpoint: flags.OtlpEndpoint = None,
    num_processes: flags.NumProcesses = 1,
    coordinator: flags.Coordinator = None,
    control: flags.Control = "127.0.0.1:50052",
) -> None:
    """Serve a checkpoint over gRPC, and HTTP if asked, until SIGTERM or SIGINT (drains; a second one ends at once).

    Ready when the standard health service says SERVING.
    """
    options = dict(locals())
    with told_errors():
        launched = _launch_config(options)
        _use_platform(platform, launched.engine)
        with ConsoleReporter(*flags.log_lines(log_format, log_level)) as reporter:
            asyncio.run(launch.serve(launched, reporter))


@app.command()
def profile(
    out: flags.CostOut,
    model: flags.Model = DEFAULT_MODEL,
    instances: flags.Instances = 8,
    tp: flags.Tp = 1,
    dtype: flags.Dtype = "auto",
    pool_tokens: flags.PoolTokens = 65536,
    page_tokens: flags.PageTokens = 16,
    ring_tokens: flags.RingTokens = 512,
    max_running: flags.MaxRunning = 256,
    dops: flags.Dops = "auto",
    prefill_buckets: flags.PrefillBuckets = "auto",
    decode_buckets: flags.DecodeBuckets = "auto",
    attention: flags.Attention = "pallas",
    kernel_sizes: flags.KernelSizes = None,
    platform: flags.Platform = "default",
    cache_dir: flags.CacheDir = "~/.cache/loong",
) -> None:
    """Measure at most 32 batches on an engine and write its cost model, for loong serve --cost.

    Give the flags that the engine will be served with. The table shows for each batch what a fit predicts that did not
    see it.
    """
    options = dict(locals())
    with told_errors():
        flags.check_folder(model)
        flags.one_of("platform", platform, "default", "cpu")
        cluster = _with_options(flags.cluster_config, options)
        engine = EngineConfig(cluster=cluster, limits=LimitsConfig(), dtype=flags.dtype_of(dtype))
        _use_platform(platform, engine)
        with ConsoleReporter() as reporter:
            profile_engine(model, engine, out, flags.cache_folder(cache_dir), reporter)


@app.command()
def worker(
    model: flags.Model,
    leader: flags.Leader,
    process_id: flags.ProcessId,
    platform: flags.Platform = "default",
    cache_dir: flags.CacheDir = "~/.cache/loong",
) -> None:
    """Be one of the other processes of an engine: everything else comes from the leader.

    The leader is `loong serve` with --num-processes, --coordinator and --control; it may start before or after.
    """
    with told_errors(), ConsoleReporter() as reporter:
        flags.check_folder(model)
        launch.work(
            model,
            leader,
            process_id,
            lambda config: _use_platform(platform, config),
            reporter,
            flags.cache_folder(cache_dir),
        )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make; it may not hold anything.", show_default=False)],
) -> None:
    """Convert a Hugging Face checkpoint to an Orbax one, which loong serve takes as well.

    The tensors stay whole, in chunks that any number of instances of any tp can read its shards from. OUT appears when
    all of it is there.
    """
    with told_errors():
        flags.check_folder(source)
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed; Orbax imports JAX
        from loong_jax.model import convert as conversion

        logging.getLogger("absl").setLevel(logging.ERROR)
        with ConsoleReporter() as reporter:
            conversion.convert(source, out, progress=reporter.progress("converting"))
            reporter.say(f"made {out}")


@app.command()
def generate(
    address: flags.Address = "127.0.0.1:50051",
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File that holds the prompt; '-': standard input.", show_default=False)
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(help="The prompt as token ids, as in 1,15,7.", show_default=False)
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(help="The prompt as what a user says, put into the model's chat template.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message before it. Absent: none.")] = None,
    max_tokens: flags.MaxTokens = None,
    temperature: flags.Temperature = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens. Absent: from all.")] = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    min_p: flags.MinP = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    logit_bias: flags.LogitBias = None,
    n: flags.NumChoices = None,
    top_logprobs: flags.TopLogprobs = None,
    prompt_logprobs: flags.PromptLogprobs = None,
    min_tokens: flags.MinTokens = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    timeout_s: flags.TimeoutS = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids, not text.")] = False,
    api_key: access_flags.ApiKey = None,
    tls: access_flags.Tls = False,
    tls_ca: access_flags.TlsCa = None,
    tls_cert: access_flags.ClientCert = None,
    tls_key: access_flags.ClientKey = None,
) -> None:
    """Send one prompt to a server and print the answer as it comes; a summary goes to standard error."""
    content = _content(prompt, prompt_file, token_ids, chat, system)
    with told_errors():
        request = generate_request(
            content,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias=flags.biases(logit_bias or ()),
            n=n,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            min_tokens=min_tokens,
            stop=stop or (),
            stop_token_ids=stop_token_id or (),
            ignore_eos=ignore_eos,
        )
        identity = ClientIdentity(api_key, tls, tls_ca, tls_cert, tls_key)
        asyncio.run(_print_answer(address, identity, request, timeout_s, ids))


@app.command(help=simulate_command.__doc__)
@functools.wraps(simulate_command)
def simulate(**options: Any) -> None:
    with told_errors():
        simulate_command(**options)


@app.command()
def chat(
    address: flags.Address = "127.0.0.1:50051",
    system: flags.SystemMessage = None,
    max_tokens: flags.MaxTokens = None,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    timeout_s: flags.TimeoutS = None,
    api_key: access_flags.ApiKey = None,
    tls: access_flags.Tls = False,
    tls_ca: access_flags.TlsCa = None,
    tls_cert: access_flags.ClientCert = None,
    tls_key: access_flags.ClientKey = None,
) -> None:
    """Talk with a served model: each line is a turn, from a terminal or a pipe; the answer is printed as it comes."""
    with told_errors():
        identity = ClientIdentity(api_key, tls, tls_ca, tls_cert, tls_key)
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        talk(lambda: LoongClient(address, identity=identity), system, sampling, timeout_s)


@app.command(help=info_command.__doc__)
@functools.wraps(info_command)
def info(**options: Any) -> None:
    with told_errors():
        info_command(**options)


@app.command(help=bench_command.__doc__)
@functools.wraps(bench_command)
def bench(**options: Any) -> None:
    with told_errors():
        bench_command(**options)


def _content(
    prompt: str | None, prompt_file: Path | None, token_ids: str | None, chat: str | None, system: str | None
) -> str | tuple[int, ...] | pb.Messages:
    given = [value for value in (prompt, prompt_file, token_ids, chat) if value is not None]
    if len(given) != 1:
        fail("give exactly one of --prompt, --prompt-file, --token-ids and --chat", code=2)
    if system is not None and chat is None:
        fail("--system goes with --chat", code=2)
    with told_errors():
        if token_ids is not None:
            return flags.numbers("token-ids", token_ids)
        if chat is not None:
            return chat_messages(chat, system)
        return prompt if prompt is not None else _read(prompt_file)


async def _print_answer(
    address: str, identity: ClientIdentity, request: pb.GenerateRequest, timeout_s: float | None, ids: bool
) -> None:
    """Choice by choice: the first as it comes, the others when those before them are whole."""
    start_s = time.monotonic()
    first_s = 0.0
    printer = Printer(request.n or 1, ids=ids, tops=request.sampling.HasField("top_logprobs"))
    async with LoongClient(address, identity=identity) as client:
        async for response in client.responses(request, timeout_s):
            if response.WhichOneof("event") == "tokens":
                first_s = first_s or time.monotonic() - start_s
            for line in printer.take(response):
                print(line, end="", flush=True)
            if response.WhichOneof("event") == "finished":
                print(summary(response.finished, first_s, time.monotonic() - start_s), file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- details


def _launch_config(options: Mapping[str, Any]) -> LaunchConfig:
    """Of `loong serve`. Raises ConfigError."""
    model, platform = options["model"], options["platform"]
    flags.check_folder(model)
    flags.one_of("platform", platform, "default", "cpu")
    engine = EngineConfig(
        cluster=_with_options(flags.cluster_config, options),
        limits=_with_options(flags.limits_config, options),
        policy=options["policy"],
        dtype=flags.dtype_of(options["dtype"]),
        full_warm_up=flags.one_of("warm-up", options["warm_up"], "minimal", "full") == "full",
        num_processes=options["num_processes"],
        coordinator=options["coordinator"],
        refit=flags.refits(options["refit"], platform),
    )
    server = ServerConfig(**{name: options[name] for name in ("host", "port", "drain_s", "stall_s")})
    given = ("event_log", "cost", "profile_dir", "max_model_len", "otlp_traces_endpoint")
    return LaunchConfig(
        model,
        engine,
        server,
        flags.cache_folder(options["cache_dir"]),
        control_address=options["control"],
        http=_with_options(flags.http_config, options),
        access=_with_options(access_flags.access_config, options),
        model_name=flags.served_name(model, options["served_model_name"]),
        **{name: options[name] for name in given},
    )


def _with_options(function: Callable[..., T], options: Mapping[str, Any]) -> T:
    """Called with those of a command's options that it takes."""
    return function(**{name: options[name] for name in inspect.signature(function).parameters})


def _read(path: Path | None) -> str:
    if path is None or str(path) == "-":
        return sys.stdin.read()
    return path.read_text(encoding="utf-8")


def _use_platform(platform: str, engine: EngineConfig) -> None:
    """Choose JAX's platform for this process. Before JAX is imported."""
    flags.one_of("platform", platform, "default", "cpu")
    if platform == "default":
        return
    num_devices = engine.cluster.num_instances * engine.cluster.tp // engine.num_processes
    asked = os.environ.get("XLA_FLAGS", "").split()
    ours = {"--xla_force_host_platform_device_count": str(num_devices), **XLA_CPU_FLAGS}
    kept = [flag for flag in asked if flag.split("=")[0] not in ours]
    os.environ["XLA_FLAGS"] = " ".join([*kept, *(f"{name}={value}" for name, value in ours.items())])
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Threads of XLA's pool: each virtual device blocks one in a collective.
    os.environ["NPROC"] = str(max(int(os.environ.get("NPROC", "0")), 2 * num_devices))
