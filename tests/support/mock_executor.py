"""An executor without a model: "KV" is the pair (position, token), kept page by page, and a sampled token is a hash of
the history that the step can actually see.

What it is: a proof device for the manager. Page tables are taken when a command is submitted, contents are read when
the step runs, and steps run in any order that keeps each device's own. So a page given away too early, written while
shared, seen twice, or a token fed from a device that does not have it, is caught at the step where it happens.
What it is not: a simulator of time (`loong_jax/sim`).
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from loong_jax import buckets
from loong_jax.config import ClusterConfig
from loong_jax.row_adjust import AFTER, BEFORE, TOKEN, RowAdjust
from loong_jax.runs import Dropped, RunTable
from loong_jax.types import (
    Adjust,
    Adjustment,
    AnyCommand,
    AnyEvent,
    CopyPages,
    DecodeRow,
    Forget,
    Fork,
    Free,
    Migrate,
    PageMove,
    PrefillRow,
    Prepare,
    ProgramReady,
    Reset,
    RunDecode,
    RunPrefill,
    Sampling,
    Scores,
    Slide,
    StepCommand,
    StepDone,
    StepFailed,
    Top,
    Truncate,
)
from tests.support.mock_matcher import MockMatcher, allowed

VOCAB = 97
_WORDS = -(-VOCAB // 32)


class MockError(AssertionError):
    """The commands ask for something a device could not do right."""


def require(condition: bool, *details: object) -> None:
    if not condition:
        raise MockError(*details)


def kv_value(window: array[int], token: int) -> int:
    """The KV of a token where every layer has a window: through the layers it depends on all KV before, so whatever is
    computed again from anything but the beginning comes out otherwise."""
    return zlib.crc32((window + array("i", [token])).tobytes()) >> 1


def visible_kv(tokens: array[int], window: int) -> array[int]:
    """What the position after `tokens` depends on directly. Without a window the KV of a token is the token."""
    if not window:
        return tokens
    kv = array("i")
    for token in tokens:
        kv.append(kv_value(kv[max(0, len(kv) - window + 1) :], token))
    return kv[-window:]


def next_token(history: array[int], sampling: Sampling, adjusted: bytes = b"") -> int:
    """The mock model: depends on every token before, in order, on the seed, and on how the logits are adjusted."""
    return zlib.crc32(history.tobytes() + adjusted, sampling.seed & 0xFFFFFFFF) % VOCAB


def likeliest(history: array[int], num_top: int) -> Top:
    tokens = tuple(zlib.crc32(history.tobytes(), k) % VOCAB for k in range(num_top))
    return Top(tokens, tuple(-float(token) for token in tokens))


def score(history: array[int], target: int) -> float:
    return -float(zlib.crc32(history.tobytes(), target) % 1000)


def adjusted(
    adjustment: Adjustment | None, prompt: array[int], generated: list[int], stop_ids: tuple[int, ...]
) -> bytes:
    """From the definition: what a row's data say about its logits, in one order."""
    if adjustment is None:
        return b""
    before = dict.fromkeys(stop_ids, 0.0) if adjustment.min_tokens else {}
    before |= dict(adjustment.logit_bias)
    if len(generated) < adjustment.min_tokens:
        before |= dict.fromkeys(stop_ids, -1e30)
    after = {}
    if adjustment.counts_output:
        after = {
            token: -(adjustment.presence_penalty + adjustment.frequency_penalty * generated.count(token))
            for token in set(generated)
        }
    entries = [(token, before.get(token, 0.0), after.get(token, 0.0)) for token in sorted(before.keys() | after.keys())]
    seen = sorted({*prompt, *generated}) if adjustment.repetition_penalty != 1 else []
    only = None
    if adjustment.grammar:
        only = np.flatnonzero(allowed(adjustment.grammar, generated, VOCAB)).tolist()
    return _encode(entries, seen, adjustment.repetition_penalty if seen else 0.0, only)


def _encode(
    entries: list[tuple[int, float, float]], seen: list[int], repetition: float, only: list[int] | None
) -> bytes:
    """`only`: the tokens that a grammar allows."""
    bits = [(token, np.float32(before).item(), np.float32(after).item()) for token, before, after in entries]
    return repr((bits, seen, np.float32(repetition).item(), only)).encode()


def _row_data(adjust: RowAdjust, position: int) -> bytes:
    """The same, as the mirror writes it for a step."""
    fields = {
        "num_entries": np.zeros(1, np.int32),
        "repetition": np.zeros(1, np.int32),
        "entries": np.zeros((1, 3, VOCAB), np.int32),
        "seen": np.zeros((1, _WORDS), np.int32),
        "constrained": np.zeros(1, np.int32),
        "allowed": np.zeros((1, _WORDS), np.int32),
    }
    adjust.write(fields, (0,), position)
    floats = fields["entries"][0].view(np.float32)
    entries = [
        (int(fields["entries"][0, TOKEN, i]), float(floats[BEFORE, i]), float(floats[AFTER, i]))
        for i in range(fields["num_entries"][0])
    ]
    repetition = float(fields["repetition"].view(np.float32)[0])
    only = _tokens(fields["allowed"]) if fields["constrained"][0] else None
    return _encode(sorted(entries), _tokens(fields["seen"]), repetition, only)


def _tokens(words: np.ndarray) -> list[int]:
    """Whose bits are set: token t at bit t // words of word t % words."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(_WORDS, 32).T.reshape(-1)
    return np.flatnonzero(bits).tolist()


def oracle(
    prompt: array[int],
    sampling: Sampling,
    num_tokens: int,
    adjustment: Adjustment | None = None,
    stop_ids: tuple[int, ...] = (),
    *,
    window: int = 0,
) -> list[int]:
    """`window`: of every layer (0: none)."""
    history, out = array("i", prompt), []
    for _ in range(num_tokens):
        seen = visible_kv(history, window)
        out.append(next_token(seen, sampling, adjusted(adjustment, prompt, out, stop_ids)))
        history.append(out[-1])
    return out


def check_reports(
    prompt: array[int],
    tokens: list[int],
    tops: list[Top],
    scores: list[Scores],
    num_prompt_top: int | None,
    window: int = 0,
) -> None:
    """Likeliest tokens and the prompt's scores are those of the text before."""
    history = array("i", prompt)
    for token, top in zip(tokens, tops, strict=False):
        assert top == likeliest(visible_kv(history, window), len(top.tokens)), (top, history)
        history.append(token)
    position = 0
    for part in scores:
        values = np.frombuffer(part.logprobs, "<f4").tolist()
        ids = np.frombuffer(part.top_tokens, "<i4").reshape(len(values), -1)
        for value, row in zip(values, ids, strict=True):
            position += 1
            before = visible_kv(array("i", prompt[:position]), window)
            assert value == score(before, prompt[position]), f"score of token {position}"
            assert tuple(row.tolist()) == likeliest(before, num_prompt_top or 0).tokens


class Entry(NamedTuple):
    instance: int
    page: int
    first: int
    count: int


class _Pending(NamedTuple):
    command: StepCommand
    instances: tuple[int, ...]
    context: tuple[tuple[Entry, ...], ...]  # by row, as the table stood at submission
    adjusted: dict[int, bytes]  # by request, as the mirror stood at submission


class _Sampled(NamedTuple):
    slot: int
    request: int
    position: int
    token: int
    top: Top | None


def _ids(tokens: bytes) -> array[int]:
    ids = array("i")
    ids.frombytes(tokens)
    return ids


def _sample(row: PrefillRow | DecodeRow, position: int, history: array[int], pending: _Pending) -> _Sampled:
    token = next_token(history, row.sampling, pending.adjusted.get(row.request, b""))
    top = likeliest(history, row.sampling.num_top) if row.sampling.num_top else None
    return _Sampled(row.slot, row.request, position, token, top)


class MockExecutor:
    def __init__(self, cluster: ClusterConfig, post: Callable[[AnyEvent], None], rng: random.Random) -> None:
        self._cluster = cluster
        self._post = post
        self._rng = rng
        self._table = RunTable(cluster.page_tokens)
        self._owners: dict[tuple[int, int], set[int]] = {}
        n = cluster.num_instances
        self._pages: list[dict[int, list[tuple[int, int] | None]]] = [{} for _ in range(n)]
        self._last: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(n)]  # slot -> request, position, token
        self._queues: list[list[int]] = [[] for _ in range(n)]
        self._pending: dict[int, _Pending] = {}
        self._failing: set[int] = set()
        self._poisoned: set[int] = set()
        self._late: list[AnyEvent] = []
        self._adjusts: dict[int, RowAdjust] = {}
        self.num_steps = 0
        self.moved_pages = 0

    # ---- the Executor protocol

    def submit(self, command: AnyCommand) -> None:
        if isinstance(command, RunPrefill | RunDecode | Migrate | CopyPages):
            self._enqueue(command)
        elif isinstance(command, Free):
            self._dropped(self._table.drop(command.request, command.instances), command.request)
        elif isinstance(command, Truncate):
            self._dropped(self._table.truncate(command.request, command.kv_len), command.request)
        elif isinstance(command, Slide):
            self._dropped(self._table.slide(command.request, command.start)[0], command.request)
        elif isinstance(command, Fork):
            self._table.share(command.parent, command.child, command.shared)
            for instance, page, _ in command.shared:
                require(command.parent in self._owners[instance, page], "fork of a page the parent lacks", command)
                self._owners[instance, page].add(command.child)
        elif isinstance(command, Adjust):
            require(command.request not in self._adjusts, "adjusted twice", command)
            grammar = command.adjustment.grammar
            matcher = MockMatcher(grammar, VOCAB) if grammar else None
            self._adjusts[command.request] = RowAdjust(command, VOCAB, matcher)
        elif isinstance(command, Forget):
            del self._adjusts[command.request]
        elif isinstance(command, Reset):
            for instance in command.instances:
                require(not self._queues[instance], "reset of an instance with steps in flight", command)
                self._pages[instance].clear()
                self._last[instance].clear()
                self._poisoned.discard(instance)
        elif isinstance(command, Prepare):
            self._late.append(ProgramReady(command.program, command.instances))

    # ---- what a test does to it

    def fail(self, step: int) -> None:
        """This step will fail when it runs."""
        self._failing.add(step)

    def lose(self, instance: int) -> None:
        """The instance dies: everything that touches it fails until it is Reset."""
        self._poisoned.add(instance)

    @property
    def steps_in_flight(self) -> list[int]:
        return sorted(self._pending)

    @property
    def pages_in_use(self) -> int:
        return len(self._owners)

    def heads(self) -> list[int]:
        """Steps whose devices have all run those before."""
        return [
            step
            for step, pending in self._pending.items()
            if all(self._queues[i][0] == step for i in pending.instances)
        ]

    def take_late(self) -> list[AnyEvent]:
        """Completions that were held back, of what is no step, too."""
        late, self._late = self._late, []
        return late

    def advance(self) -> None:
        """Run one step that heads the queue of all its devices, or let a late completion through."""
        heads = self.heads()
        require(bool(heads) or bool(self._late) or not self._pending, "queues are in deadlock")
        if heads and (not self._late or self._rng.random() < 0.7):
            self._late.append(self.run(self._rng.choice(heads)))
        if self._late and (not self._pending or self._rng.random() < 0.7):
            self._post(self._late.pop(self._rng.randrange(len(self._late))))

    # ---- submission: tables and ownership, in the order of commands

    def _enqueue(self, command: StepCommand) -> None:
        instances = (command.instance,) if isinstance(command, CopyPages) else command.instances
        require(list(instances) == sorted(set(instances)), "instances are not sorted", command)
        for instance in instances:
            require(len(self._queues[instance]) < 2, "INV-6: a third step", instance, command)
        if isinstance(command, RunPrefill):
            context = self._submit_prefill(command)
        elif isinstance(command, RunDecode):
            context = tuple(self._submit_decode_row(command, row) for row in command.rows)
            rows = [sum(row.master == i for row in command.rows) for i in instances]
            require(max(rows) <= command.bucket, "bucket is too small", command)
        elif isinstance(command, Migrate):
            require(len(instances) == 2 and len(command.moves) <= self._cluster.ladder.move_pages, command)
            context = ()
            for move in command.moves:
                self._move(move, instances)
        else:
            context = ()
            for copy in command.copies:
                self._own(command.instance, copy.dst_page, copy.request)
                self._table.put(copy.request, command.instance, copy.dst_page, copy.run)
        self._pending[command.step] = _Pending(command, instances, context, self._observe(command))
        for instance in instances:
            self._queues[instance].append(command.step)

    def _observe(self, command: StepCommand) -> dict[int, bytes]:
        """The newest tokens go to the mirror; returns what alters the logits of this step's rows."""
        if isinstance(command, RunPrefill):
            newest = [(r.request, r.runs[-1].end - 1, _ids(r.tokens)[-1]) for r in command.rows if r.emit]
        elif isinstance(command, RunDecode):
            newest = [(row.request, row.position, row.token) for row in command.rows]
        else:
            return {}
        out = {}
        for request, position, token in newest:
            adjust = self._adjusts.get(request)
            if adjust is not None:
                require(token >= 0 or not adjust.adjustment.needs_history, "penalties one step late", command)
                adjust.observe(position, token)
                out[request] = _row_data(adjust, position + 1)
        return out

    def _submit_prefill(self, command: RunPrefill) -> tuple[tuple[Entry, ...], ...]:
        page_tokens, dop = self._cluster.page_tokens, len(command.instances)
        context = tuple(self._entries(row.request, command.instances) for row in command.rows)
        num_units = sum(buckets.num_units(row.runs, page_tokens) for row in command.rows)
        require(-(-num_units // dop) * page_tokens <= command.bucket, "bucket is too small", command)
        # The moved pages' old homes may not be written by this very program: take new pages first, then release.
        for move in command.moves:
            self._own(move.dst, move.dst_page, move.request)
        for row in command.rows:
            units = buckets.units(row.runs, page_tokens)
            require(len(units) == len(row.homes) == len(row.pages), "units, homes and pages differ", row)
            for unit, home, page in zip(units, row.homes, row.pages, strict=True):
                require(home in command.instances, "home outside the group", row)
                self._own(home, page, row.request)
                self._table.put(row.request, home, page, unit)
        for move in command.moves:
            require({move.src, move.dst} <= set(command.instances), "move outside the group", move)
            self._table.move((move,))
            self._release((move.src, move.src_page), move.request)
            self.moved_pages += 1
        return context

    def _submit_decode_row(self, command: RunDecode, row: DecodeRow) -> tuple[Entry, ...]:
        require(row.master in command.instances, "master outside the group", row)
        require(row.run.end == row.position + 1, "run does not end at the position", row)
        if row.run.count == 1:
            self._own(row.master, row.page, row.request)
        require(self._owners[row.master, row.page] == {row.request}, "INV-5: write to a shared page", row)
        self._table.put(row.request, row.master, row.page, row.run)
        return self._entries(row.request, command.instances)

    def _dropped(self, dropped: Dropped, request: int) -> None:
        for instance, pages in dropped:
            for page in pages:
                self._release((instance, page), request)

    def _entries(self, request: int, group: tuple[int, ...]) -> tuple[Entry, ...]:
        held = self._table.instances(request)
        require(set(held) <= set(group), "KV outside the group", request, held, group)
        return tuple(Entry(i, e.page, e.first, e.count) for i in held for e in self._table.pages(request, i))

    def _move(self, move: PageMove, instances: tuple[int, ...]) -> None:
        require({move.src, move.dst} == set(instances), "move outside the pair", move)
        self._own(move.dst, move.dst_page, move.request)
        self._table.move((move,))
        self._release((move.src, move.src_page), move.request)
        self.moved_pages += 1

    def _own(self, instance: int, page: int, request: int) -> None:
        require(0 <= page < self._cluster.pages_per_instance, "no such page", page)
        require((instance, page) not in self._owners, "page is in use", instance, page, request)
        self._owners[instance, page] = {request}

    def _release(self, pair: tuple[int, int], request: int) -> None:
        owners = self._owners[pair]
        owners.remove(request)
        if not owners:
            del self._owners[pair]

    # ---- execution: contents, in the order of each device

    def run(self, step: int) -> AnyEvent:
        """Run one step; all its devices must have run those before it."""
        pending = self._pending.pop(step)
        for instance in pending.instances:
            require(self._queues[instance].pop(0) == step, "order")
        self.num_steps += 1
        if step in self._failing or not self._poisoned.isdisjoint(pending.instances):
            self._poisoned.update(pending.instances)
            return StepFailed(step, pending.instances, "injected")
        command = pending.command
        if isinstance(command, RunPrefill):
            return self._run_prefill(command, pending)
        if isinstance(command, RunDecode):
            return self._run_decode(command, pending)
        if isinstance(command, Migrate):
            for move in command.moves:
                self._copy(move.src, move.src_page, move.dst, move.dst_page, move.run.first, move.run.count)
        else:
            for copy in command.copies:
                instance = command.instance
                self._copy(instance, copy.src_page, instance, copy.dst_page, copy.run.first, copy.run.count)
        return StepDone(step)

    def _run_prefill(self, command: RunPrefill, pending: _Pending) -> StepDone:
        context = pending.context
        read = {(entry.instance, entry.page) for entries in context for entry in entries}
        written = {(h, p) for row in command.rows for h, p in zip(row.homes, row.pages, strict=True)}
        written |= {(move.dst, move.dst_page) for move in command.moves}
        require(not read & written, "one program reads and writes a page", read & written)
        sampled, scores = [], []
        for row, entries in zip(command.rows, context, strict=True):
            known = self._visible(entries)
            end = row.runs[-1].end
            for position, token in self._fresh(row, known).items():
                known[position] = self._computed(known, position, token)
            require(set(range(self._first_seen(end), end)) <= set(known), "prefill over a hole", row.request, end)
            if command.score:
                scores.append(self._score(row, known))
            else:
                require(not row.targets, "targets without a scoring program", row)
            for unit, home, page in zip(
                buckets.units(row.runs, self._cluster.page_tokens), row.homes, row.pages, strict=True
            ):
                self._pages[home][page] = [(p, known[p]) for p in range(unit.first, unit.end)]
            if row.emit:
                require(max(known) == end - 1, "emitting row does not end the request", row.request)
                sampled.append(_sample(row, end, self._seen(known, end), pending))
        for move in command.moves:
            self._copy(move.src, move.src_page, move.dst, move.dst_page, move.run.first, move.run.count)
        return self._done(command.step, command.instances, sampled, tuple(scores))

    def _score(self, row: PrefillRow, known: dict[int, int]) -> Scores:
        """What a scoring program says of the tokens after those of the row."""
        positions, targets = [p for run in row.runs for p in range(run.first, run.end)], _ids(row.targets)
        require(len(targets) == len(positions), "targets and runs differ", row)
        before = [self._seen(known, position + 1) for position in positions]
        values = [score(history, target) for history, target in zip(before, targets, strict=True)]
        tops = [likeliest(history, row.num_top) for history in before]
        return Scores(
            np.array(values, "<f4").tobytes(),
            row.num_top,
            np.array([top.tokens for top in tops], "<i4").tobytes(),
            np.array([top.logprobs for top in tops], "<f4").tobytes(),
        )

    def _first_seen(self, end: int) -> int:
        """The first position that the sampling of token `end` depends on directly."""
        return max(0, end - self._cluster.kv_window) if self._cluster.kv_window else 0

    def _computed(self, known: dict[int, int], position: int, token: int) -> int:
        """The KV at `position`, with what its window shows before it."""
        if not self._cluster.kv_window:
            return token
        before = {p: kv for p, kv in known.items() if p < position}
        return kv_value(self._seen(before, position, position + 1), token)

    def _seen(self, known: dict[int, int], end: int, query: int | None = None) -> array[int]:
        """The KV up to `end` that what comes at `query` (None: `end`) depends on directly."""
        seen = range(self._first_seen(query or end), end)
        require(all(p in known for p in seen), "computed over a hole", end, sorted(known))
        return array("i", [known[p] for p in seen])

    def _fresh(self, row: PrefillRow, known: dict[int, int]) -> dict[int, int]:
        positions = [p for run in row.runs for p in range(run.first, run.end)]
        tokens = array("i")
        tokens.frombytes(row.tokens)
        require(len(tokens) == len(positions), "tokens and runs differ", row)
        require(not known.keys() & set(positions), "INV-5: a position is computed twice", row.request)
        return dict(zip(positions, tokens, strict=True))

    def _run_decode(self, command: RunDecode, pending: _Pending) -> StepDone:
        context = pending.context
        for row in command.rows:
            token = row.token
            if token < 0:
                owner = self._last[row.master].get(row.slot)
                require(owner is not None, "device has no token", row)
                assert owner is not None
                require(owner[:2] == (row.request, row.position), "device has another token", row, owner)
                token = owner[2]
            if row.run.count == 1:
                self._pages[row.master][row.page] = []
            page = self._pages[row.master][row.page]
            del page[row.run.count - 1 :]  # what a truncated text left behind
            require(len(page) == row.run.count - 1, "open page has a gap", row, page)
            page.append((row.position, token))
        sampled = []
        for row, entries in zip(command.rows, context, strict=True):
            known, end = self._visible(entries), row.position + 1
            require(end == max(known) + 1, "decode over a hole", row, sorted(known))
            known[row.position] = self._computed(known, row.position, known[row.position])
            self._pages[row.master][row.page][-1] = (row.position, known[row.position])
            sampled.append(_sample(row, end, self._seen(known, end), pending))
        return self._done(command.step, command.instances, sampled)

    def _done(
        self, step: int, instances: tuple[int, ...], sampled: list[_Sampled], scores: tuple[Scores, ...] = ()
    ) -> StepDone:
        for row in sampled:
            for instance in instances:
                self._last[instance][row.slot] = (row.request, row.position, row.token)
        tops = tuple(row.top for row in sampled)
        return StepDone(
            step,
            tuple(row.token for row in sampled),
            tuple(-float(row.position) for row in sampled),
            tops if any(tops) else (),
            scores,
        )

    def _visible(self, entries: tuple[Entry, ...]) -> dict[int, int]:
        known: dict[int, int] = {}
        for instance, page, first, count in entries:
            content = self._pages[instance].get(page, [])[:count]
            require(
                [c and c[0] for c in content] == list(range(first, first + count)),
                "page holds something else", instance, page, first, count, content,
            )  # fmt: skip
            for position, token in content:  # type: ignore[misc]
                require(position not in known, "INV-5: a position is visible twice", position)
                known[position] = token
        return known

    def _copy(self, src: int, src_page: int, dst: int, dst_page: int, first: int, count: int) -> None:
        content = self._pages[src].get(src_page, [])[:count]
        require([c and c[0] for c in content] == list(range(first, first + count)), "moved page holds something else")
        self._pages[dst][dst_page] = list(content)
