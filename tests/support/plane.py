"""The data plane without a manager: scripted steps with any placement, for tests of the executor and its programs.

`Plane` allocates pages at random, issues one command at a time and waits for its event; who decides is the test.
`data_plane` shares weights and compiled programs among test modules. What it is not: the ledger's rules, or a judge.
"""

import queue
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
import numpy as np

from loong_jax.buckets import decode_bucket, prefill_bucket, units
from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.executor import Executor
from loong_jax.programs import Programs
from loong_jax.types import (
    Adjust,
    Adjustment,
    AnyEvent,
    ContextForm,
    CopyPages,
    DecodeRow,
    Fork,
    Free,
    Migrate,
    PageCopy,
    PageMove,
    Phase,
    PrefillRow,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    Scores,
    StepCommand,
    StepDone,
    Top,
    Truncate,
)
from tests.support.real_engine import TIE, DataPlane

MODELS = Path(__file__).resolve().parents[1] / "fixtures" / "models"
GREEDY = Sampling()
MAX_TOKENS = 16
"""What requests ask for; it only sways rotary embeddings that depend on a request's length."""

# One bucket each: few programs to compile. Several query tiles and ring tiles, several pages in each. Two instances
# hold sixteen chunks of 256 tokens with little to spare.
CLUSTER = ClusterConfig(
    num_instances=8,
    page_tokens=16,
    pages_per_instance=136,
    ring_tokens=64,
    query_tile_tokens=32,
    slots=16,
    ladder=LadderConfig(prefill_tokens=(64,), decode_rows=(4,), prefill_rows=4, move_pages=8, score_tokens=(64,)),
)


# Where tp exceeds the KV heads of "gqa", each rank keeps one of them.
TP_LADDER = LadderConfig(
    dops=(1, 2), prefill_tokens=(64,), decode_rows=(4,), prefill_rows=4, move_pages=8, score_tokens=(64,)
)
TP2 = msgspec.structs.replace(CLUSTER, num_instances=4, tp=2, ladder=TP_LADDER)
TP4 = msgspec.structs.replace(CLUSTER, num_instances=2, tp=4, ladder=TP_LADDER)


_data_planes: dict[tuple[str, ClusterConfig], DataPlane] = {}


def data_plane(fixture: str = "gqa", cluster: ClusterConfig = CLUSTER) -> DataPlane:
    """A fixture checkpoint on a cluster; its programs are made once for all tests of a file that ask."""
    key = fixture, cluster
    if key not in _data_planes:
        _data_planes[key] = DataPlane(MODELS / fixture, cluster)
    return _data_planes[key]


def close_data_planes() -> None:
    """At the end of a file: a process cannot map the executables of all, and the next file finds them stored."""
    while _data_planes:
        _data_planes.popitem()[1].close()


class Sequence:
    """One request: its tokens, and where its KV lies: `homes[instance]` = {page: run}. `issued`: tokens known to the
    host and tokens being sampled."""

    def __init__(self, request: int, tokens: list[int], num_instances: int, sampling: Sampling):
        self.request, self.slot, self.tokens, self.sampling = request, request, list(tokens), sampling
        self.prompt_len = self.issued = len(tokens)
        self.rope_len = len(tokens) + MAX_TOKENS
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.scores: list[Scores] = []
        self.adjustment: Adjustment | None = None
        self.stop_ids: tuple[int, ...] = ()
        self.homes: list[dict[int, Run]] = [{} for _ in range(num_instances)]

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def kv_len(self) -> int:
        """Positions with KV."""
        return sum(run.count for pages in self.homes for run in pages.values())

    def holders(self) -> set[int]:
        return {i for i, pages in enumerate(self.homes) if pages}

    def missing(self) -> list[Run]:
        """Runs of `[0, known)` without KV."""
        out, position = [], 0
        for run in sorted(run for pages in self.homes for run in pages.values()):
            assert run.first >= position, "a position with two homes"
            out += [Run(position, run.first - position)] * (run.first > position)
            position = run.end
        return out + [Run(position, len(self.tokens) - position)] * (position < len(self.tokens))


class Issued(NamedTuple):
    """A step under way: its number, the sequences that get a token from it, and those whose chunk is scored."""

    step: int
    emitting: tuple[Sequence, ...]
    scored: tuple[Sequence, ...] = ()


class Plane:
    """An executor with pools of its own over shared weights and programs (`programs`: others than the shared)."""

    def __init__(self, data: DataPlane, seed: int = 0, programs: Programs | None = None):
        self.data, self.cluster = data, data.cluster
        self.events: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
        self.executor = Executor(data.builder, data.devices, data.weights, programs or data.programs, self.events.put)
        self._free = [list(range(self.cluster.pages_per_instance)) for _ in range(self.cluster.num_instances)]
        self._rng = random.Random(seed)
        self._num_steps = self._num_requests = 0

    def close(self) -> None:
        self.executor.close()

    # ---- requests

    def sequence(
        self,
        prompt: int | list[int],
        sampling: Sampling = GREEDY,
        adjustment: Adjustment | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> Sequence:
        """A request with this prompt, or a random one of this length."""
        if isinstance(prompt, int):
            prompt = [self._rng.randrange(self.data.model.vocab_size) for _ in range(prompt)]
        self._num_requests += 1
        sequence = Sequence(self._num_requests - 1, prompt, self.cluster.num_instances, sampling)
        if adjustment is not None:
            sequence.adjustment, sequence.stop_ids = adjustment, stop_ids
            ids = np.array(prompt, "<i4").tobytes()
            self.executor.submit(Adjust(sequence.request, adjustment, ids, len(prompt), stop_ids))
        return sequence

    def fork(self, parent: Sequence, sampling: Sampling) -> Sequence:
        """A child that shares the parent's full pages and copies the others."""
        child = self.sequence(parent.tokens, sampling)
        child.rope_len = parent.rope_len
        full, open_pages = [], []
        for instance, pages in enumerate(parent.homes):
            for page, run in pages.items():
                (full if run.count == self.cluster.page_tokens else open_pages).append((instance, page, run))
        self.executor.submit(Fork(parent.request, child.request, tuple(full)))
        for instance, page, run in full:
            child.homes[instance][page] = run
        for instance, page, run in open_pages:
            copy = self.page(instance)
            self.run(CopyPages(self.next_step(), instance, (PageCopy(child.request, page, copy, run),)))
            child.homes[instance][copy] = run
        return child

    def free(self, sequence: Sequence, instances: tuple[int, ...] | None = None) -> None:
        """Drop its KV, everywhere or on some instances: that leaves holes."""
        instances = tuple(sorted(sequence.holders())) if instances is None else instances
        self.executor.submit(Free(sequence.request, instances))
        for instance in instances:
            self._free[instance] += sequence.homes[instance]
            sequence.homes[instance].clear()

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget all tokens from `num_tokens` on: their KV, and that of the last one left, whose successor is to be
        sampled again."""
        kv_len = num_tokens - 1
        self.executor.submit(Truncate(sequence.request, kv_len))
        sequence.tokens, sequence.issued = sequence.tokens[:num_tokens], num_tokens
        sequence.logprobs = sequence.logprobs[: num_tokens - sequence.prompt_len]
        for instance, pages in enumerate(sequence.homes):
            for page, run in list(pages.items()):
                if run.first >= kv_len:
                    del pages[page]
                    self._free[instance].append(page)
                elif run.end > kv_len:
                    pages[page] = Run(run.first, kv_len - run.first)

    def check(self, *sequences: Sequence, tolerance: float = 1e-4, tie: float = TIE) -> None:
        """Tokens and log-probabilities are the oracle's (see `Judge.check`)."""
        for sequence in sequences:
            assert sequence.generated, "nothing to check"
            prompt = sequence.tokens[: sequence.prompt_len]
            verdict = self.data.judge.check(
                prompt, sequence.generated, sequence.logprobs, sequence.sampling, tolerance, tie, sequence.rope_len,
                adjustment=sequence.adjustment, stop_ids=sequence.stop_ids, tops=sequence.tops,
            )  # fmt: skip
            assert verdict.num_ties == 0 or sequence.sampling.temperature == 0

    # ---- steps

    def prefill(
        self,
        group: tuple[int, ...],
        chunks: list[tuple[Sequence, int]],
        homes: list[int],
        form: ContextForm = ContextForm.RING,
        rehome: dict[int, int] | None = None,
        score: int | None = None,
    ) -> RunPrefill:
        """Prefill the next `count` missing tokens of each sequence; the units in order are kept on `homes` (cycled).
        `rehome` maps an instance to the one all its pages of these sequences move to; `score`: with scores, and so many
        likeliest tokens each."""
        command = self.prefill_command(group, chunks, homes, form, rehome, score)
        emitting = tuple(s for (s, _), row in zip(chunks, command.rows, strict=True) if row.emit)
        scored = () if score is None else tuple(s for s, _ in chunks)
        self.finish(self.issue(command, emitting)._replace(scored=scored))
        return command

    def decode(self, group: tuple[int, ...], rows: list[tuple[Sequence, int]], *, on_device: bool = False) -> RunDecode:
        """One token for each (sequence, master). `on_device`: feed the token the device sampled."""
        command = self.decode_command(group, rows, on_device=on_device)
        self.finish(self.issue(command, tuple(s for s, _ in rows)))
        return command

    def migrate(self, sequence: Sequence, targets: dict[int, int]) -> None:
        """Move pages between two instances, as many as one step takes, `targets[src]` = dst."""
        moves = self._moves([sequence], targets)
        self.run(Migrate(self.next_step(), tuple(sorted({i for pair in targets.items() for i in pair})), moves))

    def prefill_command(
        self,
        group: tuple[int, ...],
        chunks: list[tuple[Sequence, int]],
        homes: list[int],
        form: ContextForm = ContextForm.RING,
        rehome: dict[int, int] | None = None,
        score: int | None = None,
    ) -> RunPrefill:
        planned = [(sequence, _first(sequence.missing(), count)) for sequence, count in chunks]
        moves = self._moves([s for s, _ in chunks], rehome or {})
        rows, num_units = [], 0
        for sequence, runs in planned:
            cut = units(runs, self.cluster.page_tokens)
            where = [homes[(num_units + i) % len(homes)] for i in range(len(cut))]
            num_units += len(cut)
            pages = [self.page(i) for i in where]
            for home, page, run in zip(where, pages, cut, strict=True):
                sequence.homes[home][page] = run
            tokens = np.concatenate([sequence.tokens[run.first : run.end] for run in runs]).astype("<i4").tobytes()
            emit = not sequence.missing()
            sequence.issued += emit
            following = np.concatenate([(sequence.tokens + [0])[run.first + 1 : run.end + 1] for run in runs])
            targets = b"" if score is None else following.astype("<i4").tobytes()
            rows.append(
                PrefillRow(
                    sequence.request,
                    sequence.slot,
                    runs,
                    tokens,
                    tuple(where),
                    tuple(pages),
                    emit,
                    sequence.sampling,
                    sequence.rope_len,
                    targets,
                    score or 0,
                )  # fmt: skip
            )
        buckets = self.cluster.ladder.buckets(Phase.PREFILL if score is None else Phase.SCORE)
        bucket = prefill_bucket(num_units, len(group), buckets, self.cluster.page_tokens)
        assert bucket is not None, "the chunk is too large"
        return RunPrefill(self.next_step(), group, bucket, form, tuple(rows), moves, score is not None)

    def decode_command(
        self, group: tuple[int, ...], rows: list[tuple[Sequence, int]], *, on_device: bool = False
    ) -> RunDecode:
        out = []
        for sequence, master in rows:
            position = sequence.issued - 1
            page, run = self._open(sequence, master, position)
            token = -1 if on_device else sequence.tokens[position]
            out.append(
                DecodeRow(
                    sequence.request,
                    sequence.slot,
                    position,
                    token,
                    master,
                    page,
                    run,
                    sequence.sampling,
                    sequence.rope_len,
                )  # fmt: skip
            )
            sequence.homes[master][page] = run
            sequence.issued += 1
        most = max(sum(row.master == m for row in out) for m in group)
        bucket = decode_bucket(most, self.cluster.ladder)
        assert bucket is not None, "too many rows for one master"
        return RunDecode(self.next_step(), group, bucket, tuple(out))

    def run(self, command: StepCommand) -> None:
        """A step that samples nothing."""
        self.finish(self.issue(command, ()))

    def issue(self, command: StepCommand, emitting: tuple[Sequence, ...]) -> Issued:
        self.executor.submit(command)
        return Issued(command.step, emitting)

    def finish(self, issued: Issued) -> None:
        """Wait for a step, the oldest under way, and take its tokens."""
        event = self.events.get(timeout=120)
        assert isinstance(event, StepDone), event
        assert event.step == issued.step
        for sequence, token, logprob in zip(issued.emitting, event.tokens, event.logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        for sequence, top in zip(issued.emitting, event.tops, strict=False):
            sequence.tops += [top] if top is not None else []
        for sequence, scores in zip(issued.scored, event.scores, strict=True):
            sequence.scores.append(scores)

    def next_step(self) -> int:
        self._num_steps += 1
        return self._num_steps

    def page(self, instance: int) -> int:
        return self._free[instance].pop(self._rng.randrange(len(self._free[instance])))

    # ---- what the devices hold

    def pools(self) -> dict[int, list[np.ndarray]]:
        """A copy of every instance's pool, by tp rank: `[layers, pages, 2, kv_heads, page_tokens, pool_dim]`."""
        return {
            i: [np.array(shard[0, 0]) for shard in self._shards(i, "kv")] for i in range(self.cluster.num_instances)
        }

    def tables(self) -> dict[int, list[np.ndarray]]:
        """A copy of every instance's page table, by tp rank: `[entries, 3]`."""
        return {
            i: [np.array(shard[0, 0]) for shard in self._shards(i, "table")] for i in range(self.cluster.num_instances)
        }

    def _shards(self, instance: int, name: str) -> list[jax.Array]:
        array = getattr(self.executor.states.take((instance,)), name)
        return [shard.data for shard in array.addressable_shards]

    def _open(self, sequence: Sequence, master: int, position: int) -> tuple[int, Run]:
        for page, run in sequence.homes[master].items():
            if run.end == position and run.count < self.cluster.page_tokens:
                return page, Run(run.first, run.count + 1)
        return self.page(master), Run(position, 1)

    def _moves(self, sequences: list[Sequence], targets: dict[int, int]) -> tuple[PageMove, ...]:
        """All pages of the sequences on the sources; their homes change now."""
        moves = tuple(
            PageMove(sequence.request, src, page, dst, self.page(dst), run)
            for sequence in sequences
            for src, dst in targets.items()
            for page, run in sequence.homes[src].items()
        )
        by_request = {s.request: s for s in sequences}
        for move in moves:
            homes = by_request[move.request].homes
            del homes[move.src][move.src_page]
            homes[move.dst][move.dst_page] = move.run
            self._free[move.src].append(move.src_page)
        return moves


def _first(missing: list[Run], count: int) -> tuple[Run, ...]:
    """The first `count` positions of the runs."""
    out = []
    for run in missing:
        if count > 0:
            out.append(Run(run.first, min(run.count, count)))
            count -= run.count
    return tuple(out)


@contextmanager
def steady_plane(fixture: str = "gqa", cluster: ClusterConfig = CLUSTER) -> Iterator[Plane]:
    """A plane whose pools must not have moved by the end, whatever steps ran."""
    plane = Plane(data_plane(fixture, cluster))
    before = plane.executor.states.pool_pointers()
    yield plane
    assert plane.executor.states.pool_pointers() == before, "a pool was copied"
    plane.close()
