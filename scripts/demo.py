"""The demo: a server on eight virtual CPU instances, asked for needles in documents of several lengths at once.

Each document hides a pass key, a key-value pair or a marked line; beside each answer stands whether it is right. While
the requests run, a live view shows the groups. Run it by `scripts/demo`, which does the set-up. Ends with a non-zero
status when any stream failed.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import grpc
import msgspec
from needle import haystack
from needle.facts import KINDS
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from server_process import ROOT, server

from loong_jax.default_model import DEFAULT_MODEL
from serving.client import LoongClient, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.tokenizer import Tokenizer

LINE_S = 3.0  # between two lines, where there is no terminal
WIDTH = 170  # of the summary there
SHORT_TOKENS = 256
ANSWER_CHARS = 24  # shown in the summary

SERVER_FLAGS = {
    "--platform": "cpu",
    "--instances": "8",
    "--warm-up": "full",
    "--chunk-tokens": "4096",
    "--pool-tokens": "65536",
    "--max-running": "64",
}


class Stream(msgspec.Struct):
    """One request as the client sees it. `value`: what the document says, so what the answer should begin with."""

    name: str
    prompt: str
    num_prompt_tokens: int
    value: str
    max_tokens: int
    answer: str = ""
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    finished: pb.Finished | None = None
    error: str | None = None

    @property
    def right(self) -> bool:
        return haystack.is_right(self.answer, self.value)


def main() -> int:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    tokenizer = Tokenizer.load(args.model)
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer.json: the documents are texts")
    streams = make_streams(args, lambda text: len(tokenizer.encode(text)))
    flags = {**SERVER_FLAGS, "--event-log": str(args.out / "events.log")}
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True, style="dim")
    with server(args.model, flags, args.out / "server.log", say) as address:
        state = asyncio.run(watch_all(address, streams, console))
    print_summary(console, streams, state)
    replay = f"{sys.executable} scripts/replay.py {args.out / 'events.log'}"
    console.print(f"\nreplay the decisions: {replay}", soft_wrap=True)
    failed = [stream.name for stream in streams if stream.error is not None or stream.finished is None]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="checkpoint folder")
    parser.add_argument(
        "--lengths", default="16384,16384,8192,8192,4096,4096,2048,2048", help="tokens of the long documents"
    )
    parser.add_argument("--num-short", type=int, default=18, help="short documents, of 256 tokens")
    parser.add_argument("--decoys", type=int, default=4, help="other facts in each document, half of them near misses")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens to generate for a document")
    parser.add_argument("--seed", type=int, default=0, help="of documents and facts")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "demo", help="folder for the event log and the server's log"
    )
    return parser.parse_args()


def make_streams(args: argparse.Namespace, count: Callable[[str], int]) -> list[Stream]:
    """`count`: tokens of a text."""
    lengths = [int(part) for part in args.lengths.split(",")] + [SHORT_TOKENS] * args.num_short
    prose = haystack.sentences(random.Random(args.seed), max(lengths))
    streams = []
    for i, length in enumerate(lengths):
        rng = random.Random(f"{args.seed} {i}")
        fact = haystack.random_fact(rng, KINDS[i % len(KINDS)])
        # Each document begins elsewhere in the prose.
        start = rng.randrange(len(prose))
        facts = [haystack.Placed(fact, rng.random())]
        if length > SHORT_TOKENS:
            facts += haystack.decoys(rng, [fact], args.decoys)
        prompt = haystack.fit(haystack.Haystack(prose[start:] + prose[:start], facts), fact.question, length, count)
        name = f"{fact.kind.replace('_', ' ')} {i:02}"
        streams.append(Stream(name, prompt, count(prompt), fact.value, args.max_tokens))
    return streams


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
                stream.answer += response.tokens.text
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
    table = Table(title="needles found, and DoP over time", title_justify="left")
    left = ("request", "answer", "", "tokens at each DoP")
    for column in (
        "request",
        "prompt tokens",
        "hidden",
        "answer",
        "",
        "first token",
        "last token",
        "tokens at each DoP",
    ):
        table.add_column(column, justify="left" if column in left else "right")
    for stream in streams:
        first = "" if stream.first_s is None else f"{stream.first_s - stream.sent_s:.1f} s"
        history = stream.error if stream.finished is None else dop_words(stream.finished)
        table.add_row(
            stream.name,
            f"{stream.num_prompt_tokens:,}",
            stream.value,
            escape(" ".join(stream.answer.split())[:ANSWER_CHARS]),
            "[green]right[/]" if stream.right else "[red]wrong[/]",
            first,
            f"{stream.last_s - stream.sent_s:.1f} s",
            history,
        )
    console.print(table)
    console.print(f"{sum(stream.right for stream in streams)} of {len(streams)} answers are right\n", highlight=False)
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
