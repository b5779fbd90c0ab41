"""The flags of the commands: help, units, and how their values become configurations.

What it is not: the commands (`serving/cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loong_jax.config import ClusterConfig, ConfigError, LadderConfig, LimitsConfig, ladder_for
from loong_jax.policy import POLICIES
from serving.http.config import HttpConfig
from serving.logs import FORMATS, LEVELS

Model = Annotated[
    Path,
    typer.Argument(
        help="Folder of a Hugging Face checkpoint, or of one made by loong convert; serve comes with one.",
        show_default=False,
    ),
]
# Spellings of vLLM and SGLang stand beside ours where they mean the same; `serving/spellings.py` says so of the others.
Instances = Annotated[int, typer.Option(help="Instances; each holds one copy of the weights.")]
Tp = Annotated[
    int,
    typer.Option(
        "--tp", "--tensor-parallel-size", "-tp", "--tp-size", help="Devices of an instance (tensor parallelism)."
    ),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on. Beyond loopback it needs --api-keys or --tls-client-ca.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: any free one.")]
HttpPort = Annotated[
    int,
    typer.Option(min=0, max=65535, help="Port of the OpenAI-compatible HTTP listener, on the same address; 0: none."),
]
ServedModelName = Annotated[
    str | None, typer.Option(help="The model's name for clients. Default: the folder's.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.")]
PoolTokens = Annotated[int, typer.Option(min=1, help="KV of all instances together, in tokens.")]
PageTokens = Annotated[
    int, typer.Option("--page-tokens", "--block-size", "--page-size", min=1, help="Tokens of a page.")
]
RingTokens = Annotated[int, typer.Option(min=1, help="Tokens of a context tile that circulates in prefill.")]
Attention = Annotated[
    str, typer.Option(help="'pallas': kernels where the platform has them. 'reference': attention in pure JAX.")
]
KernelSizes = Annotated[
    Path | None, typer.Option(help="Sizes of kernels as scripts/tune_kernels.py measured them. Default: by heuristics.")
]
MaxRunning = Annotated[
    int,
    typer.Option("--max-running", "--max-num-seqs", "--max-running-requests", min=1, help="Requests running at once."),
]
MaxWaiting = Annotated[
    int,
    typer.Option("--max-waiting", "--max-queued-requests", min=1, help="Requests waiting at once; more are refused."),
]
ChunkTokens = Annotated[
    int,
    typer.Option(
        "--chunk-tokens",
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        min=1,
        help="New tokens of one prefill step over its group.",
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        "--context-length",
        min=1,
        help="Longest prompt and answer together, in tokens. Default: what the model can, as far as the pool holds it.",
    ),
]
Dops = Annotated[str, typer.Option(help="Degrees of parallelism, as in 1,2,4,8. auto: by the number of instances.")]
PrefillBuckets = Annotated[
    str,
    typer.Option(
        help="Sizes of prefill programs: tokens per instance. auto: 128,512,2048,8192; with cpu 512, and 512,2048 for "
        "one or two instances."
    ),
]
DecodeBuckets = Annotated[
    str,
    typer.Option(
        help="Sizes of decode programs: rows per master. auto: 1,8,32,128; with cpu 8, and 1,8,32 for one or two "
        "instances."
    ),
]
WarmUp = Annotated[
    str, typer.Option(help="Ready once programs are there of: 'minimal': DoP 1 and the largest; 'full': every group.")
]
PolicyName = Annotated[str, typer.Option(help=f"Scheduling policy: {', '.join(POLICIES)}.")]
Platform = Annotated[
    str, typer.Option(help="'default': the devices JAX finds. 'cpu': virtual devices, as many as are needed.")
]
CacheDir = Annotated[
    str, typer.Option(help="Folder that keeps compiled programs for the next start; 'none': no folder.")
]
EventLog = Annotated[
    Path | None, typer.Option(help="File for all events, to be replayed by scripts/replay.py. Default: none.")
]
CostPath = Annotated[
    Path | None, typer.Option(help="Cost model measured by loong profile. Default: one that claims no numbers.")
]
CostOut = Annotated[Path, typer.Option("--out", help="File for the cost model.", show_default=False)]
Refit = Annotated[
    str,
    typer.Option(
        help="Correct the cost model by measured steps: on, off; auto: not with cpu, whose virtual devices share cores."
    ),
]
DrainS = Annotated[float, typer.Option(min=0, help="Time for open streams after the first signal, in seconds.")]
StallS = Annotated[
    float, typer.Option(min=1, help="An engine that does none of its work for so long stops serving, in seconds.")
]
ProfileDir = Annotated[
    Path | None, typer.Option(help="Folder for profiles that StartProfile asks for. Default: none are made.")
]
LogFormat = Annotated[str, typer.Option(help=f"Lines of log: {' or '.join(FORMATS)}.")]
LogLevel = Annotated[str, typer.Option(help=f"Lines of at least this level: {', '.join(LEVELS)}.")]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otlp-traces-endpoint",
        help="URL of an OpenTelemetry collector for spans (OTLP, gRPC), as in http://localhost:4317. Default: none.",
    ),
]
NumProcesses = Annotated[
    int,
    typer.Option("--num-processes", "--nnodes", min=1, help="Processes of this engine; all but this one are workers."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        "--dist-init-addr",
        help="HOST:PORT of this host for jax.distributed, with several processes. Default: none.",
    ),
]
Control = Annotated[
    str, typer.Option(help="HOST:PORT of this host that workers join, with several processes. Keep it private.")
]
Leader = Annotated[str, typer.Option(help="HOST:PORT of the leader's --control.")]
ProcessId = Annotated[int, typer.Option("--process-id", "--node-rank", min=1, help="Number of this process, from 1.")]


# Of `loong generate` and `loong chat`
Address = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
SystemMessage = Annotated[str | None, typer.Option("--system", help="System message before the turns. Absent: none.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate. Default: the server's (256).")]
Temperature = Annotated[float | None, typer.Option(help="0 or absent: greedy; up to 100.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this much probability. Absent: from all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable. Absent: drawn by the server.")]
TimeoutS = Annotated[
    float | None, typer.Option(help="Give up on an answer after this time, in seconds. Absent: never.")
]

# Of `loong generate`
NumChoices = Annotated[
    int | None, typer.Option("--n", help="Answers to the prompt, 1 to 64; several need a temperature. Absent: 1.")
]
MinP = Annotated[
    float | None, typer.Option(help="Sample from tokens with this share of the largest probability. Absent: all.")
]
MinTokens = Annotated[int | None, typer.Option(help="No end before so many tokens. Absent: 0.")]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Against tokens that were generated, -2 to 2. Absent: none.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="The same for each time they were generated. Absent: none.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Against tokens of prompt and answer, 0.1 to 10. Absent: 1, none.")
]
LogitBias = Annotated[
    list[str] | None, typer.Option(help="TOKEN=BIAS, as in 17=-100: added to its logit; may be repeated.")
]
TopLogprobs = Annotated[
    int | None, typer.Option(help="Print each token with so many of the likeliest, 0 to 20. Absent: not.")
]
PromptLogprobs = Annotated[int | None, typer.Option(help="Print the prompt's tokens in the same way. Absent: not.")]


# An executable takes hundreds of memory mappings on CPU, and a process gets 65,530 by default: with many instances, and
# so many groups, there is room for one size of each step.
CPU_LADDER = LadderConfig(prefill_tokens=(512,), decode_rows=(8,), score_tokens=(512,))
CPU_LADDER_OF_FEW = LadderConfig(prefill_tokens=(512, 2048), decode_rows=(1, 8, 32), score_tokens=(512,))
FEW_INSTANCES = 2
MAX_FILE_CHARACTERS = 1 << 20


def cluster_config(
    *,
    platform: str,
    instances: int,
    tp: int,
    pool_tokens: int,
    page_tokens: int,
    ring_tokens: int,
    max_running: int,
    dops: str,
    prefill_buckets: str,
    decode_buckets: str,
    attention: str = "pallas",
    kernel_sizes: Path | None = None,
) -> ClusterConfig:
    """Raises ConfigError."""
    if instances < 1:
        raise ConfigError("instances: must be positive")
    ladder = LadderConfig()
    if platform == "cpu":
        ladder = CPU_LADDER_OF_FEW if instances <= FEW_INSTANCES else CPU_LADDER
    ladder = ladder_for(instances, ladder)
    given = {
        "prefill_tokens": ("prefill-buckets", prefill_buckets),
        "decode_rows": ("decode-buckets", decode_buckets),
        "dops": ("dops", dops),
    }
    sizes = {field: numbers(flag, text) for field, (flag, text) in given.items() if text != "auto"}
    if "prefill_tokens" in sizes:
        prefill_tokens = sizes["prefill_tokens"]
        most = ladder.score_tokens[-1]
        sizes["score_tokens"] = (max((b for b in prefill_tokens if b <= most), default=min(prefill_tokens)),)
    ladder = msgspec.structs.replace(ladder, **sizes)
    return ClusterConfig(
        num_instances=instances,
        tp=tp,
        page_tokens=page_tokens,
        pages_per_instance=-(-pool_tokens // (instances * page_tokens)),
        ring_tokens=ring_tokens,
        attention=one_of("attention", attention, "pallas", "reference"),
        kernel_sizes=_text_of("kernel-sizes", kernel_sizes) if kernel_sizes else "",
        slots=max_running,
        ladder=ladder,
    )


def http_config(*, host: str, http_port: int, model: Path, served_model_name: str | None) -> HttpConfig | None:
    """None without a port. Raises ConfigError."""
    name = served_name(model, served_model_name)
    return HttpConfig(host=host, port=http_port, model_name=name, model_root=str(model)) if http_port else None


def served_name(model: Path, name: str | None) -> str:
    """What clients call the model. Raises ConfigError."""
    name = model.resolve().name if name is None else name
    if not (1 <= len(name) <= 200 and name.isprintable()):
        raise ConfigError(f"served-model-name: {name[:200]!r} has not 1 to 200 printable characters")
    return name


def limits_config(*, max_waiting: int, max_running: int, chunk_tokens: int) -> LimitsConfig:
    return LimitsConfig(max_waiting=max_waiting, max_running=max_running, chunk_tokens=chunk_tokens)


def refits(refit: str, platform: str) -> bool:
    """Groups of virtual devices run one after the other: how long one takes says little of it alone. Raises
    ConfigError."""
    return one_of("refit", refit, "auto", "on", "off") == "on" or (refit == "auto" and platform != "cpu")


def log_lines(log_format: str, log_level: str) -> tuple[str, str]:
    """Raises ConfigError."""
    return one_of("log-format", log_format, *FORMATS), one_of("log-level", log_level, *LEVELS)


def cache_folder(text: str) -> Path | None:
    """None: nothing is kept."""
    return None if text == "none" else Path(text).expanduser()


def dtype_of(dtype: str) -> str | None:
    """None: the checkpoint's. Raises ConfigError."""
    return None if one_of("dtype", dtype, "auto", "float32", "bfloat16") == "auto" else dtype


def check_folder(model: Path) -> None:
    """Raises ConfigError when there is none: nothing is downloaded by name."""
    if not model.is_dir():
        raise ConfigError(
            f"model: {str(model)!r} is no folder here; give one with config.json, safetensors and tokenizer.json "
            "(nothing is downloaded)"
        )


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4). Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is no list of integers such as 1,2,4") from None


def biases(texts: Sequence[str]) -> dict[int, float]:
    """["17=-100"] -> {17: -100.0}. Raises ConfigError."""
    try:
        pairs = [text.split("=") for text in texts]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise ConfigError(f"logit-bias: {' '.join(texts)!r} is not made of pairs such as 17=-100") from None


def _text_of(flag: str, path: Path) -> str:
    """A small file. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: {str(path)[:300]!r} can not be read: {error}") from None
    if len(text) > MAX_FILE_CHARACTERS:
        raise ConfigError(f"{flag}: {str(path)[:300]!r} has more than {MAX_FILE_CHARACTERS} characters")
    return text


def one_of(flag: str, value: str, *allowed: str) -> str:
    """Raises ConfigError."""
    if value not in allowed:
        raise ConfigError(f"{flag}: {value!r} is none of {', '.join(allowed)}")
    return value
