"""Needles in haystacks, asked through a server: exact match by context length and depth, for any model.

python scripts/eval_needle.py --lengths 4096,16384 [--decoys] [--model DIR] [--instances N] [--json OUT] [--png OUT]

Each haystack is prose of its own, with one fact at each depth in turn (a prompt each): a pass key, a key-value pair
or a marked line. With --decoys there is another fact for every 1,500 tokens, and half of them share kind and one word
of the key with the fact that is asked for. A prompt ends in the question; an answer is right when it is the value.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from needle import haystack
from needle.facts import KINDS, Kind
from rich.console import Console
from rich.progress import track
from rich.table import Table
from server_process import server

from loong_jax.default_model import DEFAULT_MODEL
from serving.client import LoongClient, generate_request
from serving.tokenizer import Tokenizer

ANSWER_TOKENS = 16
DECOY_EVERY_TOKENS = 1500
PAGE_TOKENS = 16


class Question(msgspec.Struct):
    """One prompt and what came of it. `dops`: degrees of parallelism that its prefill and decode ran at."""

    length: int
    haystack: int
    depth: float
    kind: Kind
    prompt: str
    value: str
    answer: str = ""
    prompt_tokens: int = 0
    dops: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return haystack.is_right(self.answer, self.value)


def main(words: Sequence[str] | None = None) -> int:
    args = parse_args(words)
    console = Console(stderr=True)
    tokenizer = Tokenizer.load(args.model)
    if tokenizer is None:
        console.print(f"{args.model} has no tokenizer.json: prompts are texts")
        return 1
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    questions = make_questions(args, lambda text: len(tokenizer.encode(text)), console)
    with tempfile.TemporaryDirectory() as folder:
        with server(args.model, server_flags(args), Path(folder) / "server.log", say) as address:
            asyncio.run(ask_all(address, questions, args.concurrency, say))
    rows = rows_of(questions)
    Console().print(table_of(rows))
    if args.json:
        write_json(args.json, args, rows, questions)
    if args.png:
        draw(args.png, rows, title_of(args))
    return 0


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=ints, default=(4096,), help="tokens of prompt and answer, as in 4096,16384")
    parser.add_argument("--depths", type=floats, default=(0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), help="0: beginning, 1: end")
    parser.add_argument("--haystacks", type=int, default=5, help="independent ones for each length")
    parser.add_argument("--questions", type=int, help="of a haystack, the depths in turn; default: one at each depth")
    parser.add_argument("--decoys", action="store_true", help="other facts, half of them near misses")
    parser.add_argument(
        "--prose", choices=("mixed", "classic"), default="mixed", help="classic: the same five sentences"
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="checkpoint folder; default: the one shipped")
    parser.add_argument("--instances", type=int, default=1, help="virtual CPU instances, so the largest DoP")
    parser.add_argument(
        "--dops", default="auto", help="degrees of parallelism the server may use, 1 among them, as in 1,8"
    )
    parser.add_argument("--platform", default="cpu", help="as of loong serve")
    parser.add_argument("--dtype", default="auto", help="as of loong serve")
    parser.add_argument("--chunk-tokens", type=int, default=4096, help="as of loong serve")
    parser.add_argument("--prefill-buckets", default="auto", help="as of loong serve")
    parser.add_argument("--concurrency", type=int, default=1, help="prompts under way at once")
    parser.add_argument("--seed", type=int, default=0, help="of haystacks, facts and decoys")
    parser.add_argument("--json", type=Path, help="write rows and every answer here")
    parser.add_argument("--png", type=Path, help="draw a heat map here; needs the extra `plots`")
    return parser.parse_args(words)


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def depths_of(args: argparse.Namespace, number: int) -> list[float]:
    """Of the questions to a haystack: where not every depth is asked, each haystack goes on where the last ended."""
    count = args.questions or len(args.depths)
    return [args.depths[(number * count + j) % len(args.depths)] for j in range(count)]


def make_questions(args: argparse.Namespace, count: Callable[[str], int], console: Console) -> list[Question]:
    """Haystack i asks depth j for kind i + j, so each depth sees every kind."""
    questions = []
    haystacks = [(length, number) for length in args.lengths for number in range(args.haystacks)]
    for length, number in track(haystacks, "writing haystacks", console=console):
        prose = haystack.sentences(random.Random(f"{args.seed} {length} {number}"), length, args.prose)
        for j, depth in enumerate(depths_of(args, number)):
            rng = random.Random(f"{args.seed} {length} {number} {depth}")
            fact = haystack.random_fact(rng, KINDS[(number + j) % len(KINDS)])
            facts = [haystack.Placed(fact, depth)]
            if args.decoys:
                facts += haystack.decoys(rng, [fact], -(-length // DECOY_EVERY_TOKENS))
            room = length - ANSWER_TOKENS  # the context holds the answer, too
            prompt = haystack.fit(haystack.Haystack(prose, facts), fact.question, room, count)
            questions.append(Question(length, number, depth, fact.kind, prompt, fact.value))
    return questions


def server_flags(args: argparse.Namespace) -> dict[str, str]:
    """The pool holds what is under way at once, and a page of each instance is never whole."""
    tokens = args.concurrency * (max(args.lengths) + ANSWER_TOKENS) + 2 * PAGE_TOKENS * args.instances
    return {
        "--platform": args.platform,
        "--instances": str(args.instances),
        "--dops": args.dops,
        "--dtype": args.dtype,
        "--page-tokens": str(PAGE_TOKENS),
        "--pool-tokens": str(tokens),
        "--chunk-tokens": str(args.chunk_tokens),
        "--prefill-buckets": args.prefill_buckets,
        "--max-running": str(max(8, args.concurrency)),
    }


async def ask_all(address: str, questions: list[Question], concurrency: int, say: Callable[[str], None]) -> None:
    """Fill in the answers, a line for each. Errors of the server are raised."""
    free = asyncio.Semaphore(concurrency)
    done: list[Question] = []
    async with LoongClient(address) as client:

        async def ask(question: Question) -> None:
            async with free:
                began_s = time.monotonic()
                request = generate_request(question.prompt, max_tokens=ANSWER_TOKENS, stop=["\n"])
                generation = await client.generate(request)
                question.seconds = time.monotonic() - began_s
            question.answer = generation.text
            question.prompt_tokens = generation.finished.usage.prompt_tokens
            question.dops = tuple(sorted({run.dop for run in generation.finished.dop_history}))
            done.append(question)
            say(
                f"{len(done)} of {len(questions)}, {sum(q.right for q in done)} right; "
                f"{question.prompt_tokens} tokens, haystack {question.haystack}, depth {question.depth:g}, "
                f"{question.kind}: {question.value} {'right' if question.right else f'WRONG {question.answer!r}'}, "
                f"{question.seconds:.1f} s at DoP {question.dops}"
            )

        await asyncio.gather(*(ask(question) for question in questions))


def rows_of(questions: Sequence[Question]) -> list[dict]:
    """Accuracy by length and depth."""
    cells: dict[tuple[int, float], list[bool]] = {}
    for question in questions:
        cells.setdefault((question.length, question.depth), []).append(question.right)
    return [
        {"length": length, "depth": depth, "n": len(right), "accuracy": sum(right) / len(right)}
        for (length, depth), right in sorted(cells.items())
    ]


def table_of(rows: Sequence[dict]) -> Table:
    depths = sorted({row["depth"] for row in rows})
    table = Table(title="exact match, right of asked, by depth", title_justify="left")
    for name in ("length", *(f"{depth:g}" for depth in depths), "all"):
        table.add_column(name, justify="right")
    for length in sorted({row["length"] for row in rows}):
        cells = {row["depth"]: row for row in rows if row["length"] == length}
        words = [f"{_right(cells[d])}/{cells[d]['n']}" if d in cells else "" for d in depths]
        asked = sum(row["n"] for row in cells.values())
        right = sum(_right(row) for row in cells.values())
        table.add_row(f"{length:,}", *words, f"{right}/{asked} = {right / asked:.1%}")
    return table


def _right(row: dict) -> int:
    return round(row["accuracy"] * row["n"])


def title_of(args: argparse.Namespace) -> str:
    words = "with decoys" if args.decoys else "without decoys"
    return f"{args.model.name}: exact match {words}, {args.haystacks} haystacks a length, {args.instances} instances"


def write_json(path: Path, args: argparse.Namespace, rows: Sequence[dict], questions: Sequence[Question]) -> None:
    samples = [{**msgspec.structs.asdict(q), "right": q.right} for q in questions]
    for sample in samples:
        del sample["prompt"]  # made again from the arguments
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"arguments": told, "rows": rows, "samples": samples}, indent=1) + "\n", encoding="utf-8"
    )


def draw(path: Path, rows: Sequence[dict], title: str) -> None:
    """A heat map: lengths across, depths down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for row in rows:
        grid[depths.index(row["depth"])][lengths.index(row["length"])] = row["accuracy"]
    figure, axes = plt.subplots(figsize=(2 + 1.2 * len(lengths), 1.5 + 0.45 * len(depths)), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(title, fontsize=8)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, "" if value != value else f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
