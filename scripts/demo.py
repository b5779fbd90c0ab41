"""The demo: a server on eight virtual CPU instances, long and short prompts at once, and what the groups do meanwhile.

Run it by `scripts/demo`, which does the set-up. Ends with a non-zero status when any stream failed.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from serving.client import LoongClient, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
READY_S = 600.0
LINE_S = 3.0  # between two lines, where there is no terminal
WIDTH = 150  # of the summary there

SERVER_FLAGS = {
    "--platform": "cpu",
    "--instances": "8",
    "--warm-up": "full",
    "--chunk-tokens": "4096",
    "--pool-tokens": "65536",
    "--max-running": "64",
}


class Stream(msgspec.Struct):
    """One request as the client sees it."""

    name: str
    prompt: list[int]
    max_tokens: int
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    finished: pb.Finished | None = None
    error: str | None = None


def main() -> int:
    args = parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    model, vocab_size = model_of(args, out)
    streams = make_streams(args, vocab_size)
    with server(model, out, console) as address:
        state = asyncio.run(watch_all(address, streams, console))
    print_summary(console, streams, state)
    console.print(f"\nreplay the decisions: {sys.executable} scripts/replay.py {out / 'events.log'}", soft_wrap=True)
    failed = [stream.name for stream in streams if stream.error is not None or stream.finished is None]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: a small one with random weights, made here")
    parser.add_argument("--num-long", type=int, default=2, help="long prompts")
    parser.add_argument("--long-tokens", type=int, default=16_384, help="tokens of the shortest long prompt")
    parser.add_argument("--num-short", type=int, default=24, help="short prompts")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens to generate for a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    parser.add_argument(
        "--out", default=str(ROOT / "out" / "demo"), help="folder for the event log and the server's log"
    )
    return parser.parse_args()


def model_of(args: argparse.Namespace, out: Path) -> tuple[Path, int]:
    """The checkpoint's folder and its vocabulary size. Made in a process of its own: this one stays free of JAX."""
    from loong_jax.model.hf_config import read_config

    directory = Path(args.model) if args.model else out / "model"
    if not args.model:
        code = f"from loong_jax.model.default_model import make_default_model; make_default_model({str(directory)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return directory, read_config(directory).vocab_size


def make_streams(args: argparse.Namespace, vocab_size: int) -> list[Stream]:
    rng = random.Random(args.seed)

    def prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(num_tokens)]

    long = [
        Stream(f"long-{i}", prompt(args.long_tokens + rng.randrange(2048)), args.max_tokens)
        for i in range(args.num_long)
    ]
    short = [
        Stream(f"short-{i:02}", prompt(rng.randrange(8, 400)), rng.randrange(args.max_tokens // 2, args.max_tokens + 1))
        for i in range(args.num_short)
    ]
    return long + short


@contextlib.contextmanager
def server(model: Path, out: Path, console: Console):
    """A server on a free port; yields its address when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        **SERVER_FLAGS,
        "--port": str(port),
        "--cache-dir": str(ROOT / ".cache" / "loong"),
        "--event-log": str(out / "events.log"),
    }
    command = [sys.executable, "-c", "from serving.cli import main; main()", "serve", str(model)]
    command += [part for flag in flags.items() for part in flag]
    log = out / "server.log"
    console.print("loong serve", str(model), *command[5:], style="dim", soft_wrap=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"127.0.0.1:{port}"
        asyncio.run(wait_ready(address, process, log, console))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


async def wait_ready(address: str, process: subprocess.Popen, log: Path, console: Console) -> None:
    """Show the server's words until it is ready."""
    shown = 0
    deadline_s = time.monotonic() + READY_S
    async with LoongClient(address) as client:
        while True:
            ready = await client.is_ready(timeout_s=1.0)
            text = log.read_text(errors="replace")
            whole = text.rfind("\n") + 1
            if whole > shown:
                console.print(text[shown : whole - 1], markup=False, highlight=False, soft_wrap=True)
                shown = whole
            if ready:
                return
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}; its log is {log}")
            if time.monotonic() > deadline_s:
                raise SystemExit(f"the server was not ready within {READY_S:g} s; its log is {log}")
            await asyncio.sleep(0.3)


async def watch_all(address: str, streams: list[Stream], console: Console) -> pb.State:
    """Send all prompts at once, show the state while they run, and return the last state."""
    async with LoongClient(address) as client:
        start_s = time.monotonic()
        running = asyncio.gather(*(run_stream(client, stream) for stream in streams))
        async with contextlib.aclosing(states(client, running)) as watch:
            if console.is_terminal:
                with Live(console=console, refresh_per_second=4) as live:
                    async for state in watch:
                        live.update(Group(*tables(state, streams, time.monotonic() - start_s)))
            else:
                await print_lines(watch, streams, console, start_s)
        await running
        return await client.state()


async def states(client: LoongClient, running: asyncio.Future) -> AsyncGenerator[pb.State, None]:
    while not running.done():
        try:
            yield await client.state()
        except grpc.aio.AioRpcError:  # the streams will tell
            pass
        await asyncio.wait({running}, timeout=0.25)


async def print_lines(watch: AsyncIterator[pb.State], streams: list[Stream], console: Console, start_s: float) -> None:
    said_s = -LINE_S
    async for state in watch:
        now_s = time.monotonic() - start_s
        if now_s - said_s >= LINE_S:
            said_s = now_s
            console.print(line(state, streams, now_s), markup=False, highlight=False, soft_wrap=True)


async def run_stream(client: LoongClient, stream: Stream) -> None:
    request = generate_request(stream.prompt, max_tokens=stream.max_tokens, ignore_eos=True, request_id=stream.name)
    stream.sent_s = time.monotonic()
    try:
        async for response in client.responses(request):
            stream.last_s = time.monotonic()
            if response.WhichOneof("event") == "tokens":
                stream.first_s = stream.first_s or stream.last_s
                stream.num_tokens += len(response.tokens.token_ids)
            else:
                stream.finished = response.finished
    except grpc.aio.AioRpcError as error:
        stream.error = f"{error.code().name}: {error.details()}"


# ------------------------------------------------------------------------------------------------- what a person sees


def phase_name(phase: pb.Phase) -> str:
    return pb.Phase.Name(phase).removeprefix("PHASE_").lower()


def tables(state: pb.State, streams: list[Stream], now_s: float) -> list[Table]:
    groups = Table(title=f"groups after {now_s:.0f} s", title_justify="left")
    for column in ("phase", "DoP", "instances", "requests", "tokens/s"):
        groups.add_column(column, justify="left" if column in ("phase", "instances") else "right", min_width=8)
    for group in state.groups:
        groups.add_row(
            phase_name(group.phase),
            str(group.dop),
            " ".join(map(str, group.instances)),
            str(group.requests),
            f"{group.tokens_per_s:,.0f}",
        )
    pools = Table(title="pool use", title_justify="left")
    pools.add_column("instance")
    pools.add_column("")
    pools.add_column("pages", justify="right")
    for instance in state.instances:
        share = instance.pages_used / instance.pages_total
        bar = "█" * round(24 * share)
        pools.add_row(str(instance.index), f"{bar:<24}", f"{instance.pages_used} of {instance.pages_total}")
    totals = Table.grid(padding=(0, 2))
    totals.add_row(*progress_words(state, streams))
    return [groups, pools, totals]


def progress_words(state: pb.State, streams: list[Stream]) -> list[str]:
    counters = state.counters
    return [
        f"{sum(stream.finished is not None for stream in streams)} of {len(streams)} done",
        f"{sum(stream.num_tokens for stream in streams)} tokens streamed",
        f"{counters.scale_ups} scale-ups, {counters.scale_downs} scale-downs",
    ]


def line(state: pb.State, streams: list[Stream], now_s: float) -> str:
    groups = " | ".join(
        f"{phase_name(group.phase)} DoP {group.dop} on {','.join(map(str, group.instances))}: "
        f"{group.requests} requests, {group.tokens_per_s:,.0f} tokens/s"
        for group in state.groups
    )
    use = " ".join(f"{100 * i.pages_used // i.pages_total}%" for i in state.instances)
    return f"{now_s:5.0f} s  {', '.join(progress_words(state, streams))}; pools {use}; {groups or 'no group'}"


def print_summary(console: Console, streams: list[Stream], state: pb.State) -> None:
    table = Table(title="DoP over time", title_justify="left")
    for column in ("request", "prompt", "answer", "first token", "last token", "tokens at each DoP"):
        table.add_column(column, justify="right" if column != "tokens at each DoP" else "left")
    for stream in streams:
        first = "" if stream.first_s is None else f"{stream.first_s - stream.sent_s:.1f} s"
        history = stream.error if stream.finished is None else dop_words(stream.finished)
        table.add_row(
            stream.name,
            f"{len(stream.prompt):,}",
            str(stream.num_tokens),
            first,
            f"{stream.last_s - stream.sent_s:.1f} s",
            history,
        )
    console.print(table)
    counters = state.counters
    steps = counters.steps_prefill + counters.steps_decode
    for name, value in (
        ("steps", f"{counters.steps_prefill} prefill, {counters.steps_decode} decode, {counters.steps_failed} failed"),
        ("scale-ups and -downs", f"{counters.scale_ups} and {counters.scale_downs}"),
        ("KV moved by migration", f"{counters.kv_bytes_migrated:,} bytes"),
        ("KV re-homed within the ring", f"{counters.kv_bytes_rehomed:,} bytes (no transfer of its own)"),
        ("compiles after readiness", str(counters.compiles_after_ready)),
        ("engine thread", f"{counters.engine_cpu_us / max(steps, 1):.0f} us of CPU a step"),
    ):
        console.print(f"{name + ':':<30}{value}", highlight=False)


def dop_words(finished: pb.Finished) -> str:
    """ "prefill 8: 16384, decode 3: 40" """
    return ", ".join(f"{phase_name(run.phase)} {run.dop}: {run.tokens}" for run in finished.dop_history)


if __name__ == "__main__":
    sys.exit(main())
