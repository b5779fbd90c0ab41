"""The data plane without a manager: scripted steps with any placement, for tests of the executor and its programs.

`Plane` allocates pages naively and issues one command at a time, waiting for its event. Who decides is the test.
"""

import queue
import random

import jax
import numpy as np

from loong_jax.buckets import decode_bucket, prefill_bucket, units
from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.esp.groups import Devices
from loong_jax.esp.steps import StepBuilder
from loong_jax.executor import Executor
from loong_jax.programs import Programs
from loong_jax.types import (
    ContextForm,
    DecodeRow,
    Free,
    Migrate,
    PageMove,
    PrefillRow,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    StepDone,
)


class Sequence:
    """One request: its tokens, and where its KV lies: `homes[instance]` = {page: run}."""

    def __init__(self, request: int, tokens: list[int], num_instances: int, sampling: Sampling):
        self.request, self.slot, self.tokens, self.sampling = request, request, list(tokens), sampling
        self.prompt_len = len(tokens)
        self.logprobs: list[float] = []
        self.homes: list[dict[int, Run]] = [{} for _ in range(num_instances)]
        self.kv_len = 0

    def holders(self) -> set[int]:
        return {i for i, pages in enumerate(self.homes) if pages}


class Plane:
    def __init__(self, model: ModelConfig, cluster: ClusterConfig, weights: list[list], *, store=None):
        platform = "cpu"
        self.cluster, self.events = cluster, queue.SimpleQueue()
        self.devices = Devices(jax.devices(), cluster.num_instances, cluster.tp)
        self.builder = StepBuilder(model, cluster, platform)
        self.programs = Programs(
            self.builder.build, self.devices.mesh, store, self.events.put, f"test-{model}-{cluster}"
        )
        self.executor = Executor(self.builder, self.devices, weights, self.programs, self.events.put)
        self._free = [list(range(cluster.pages_per_instance)) for _ in range(cluster.num_instances)]
        self._step = 0

    def page(self, instance: int) -> int:
        return self._free[instance].pop(random.randrange(len(self._free[instance])))

    def run(self, command) -> StepDone:
        self.executor.submit(command)
        event = self.events.get(timeout=300)
        assert isinstance(event, StepDone), event
        assert event.step == command.step
        return event

    def next_step(self) -> int:
        self._step += 1
        return self._step

    def prefill(
        self,
        group: tuple[int, ...],
        chunks: list[tuple[Sequence, int]],
        homes: list[int],
        form: ContextForm = ContextForm.RING,
        rehome: dict[int, int] | None = None,
    ) -> None:
        """Prefill the next `n` tokens of each sequence; the units in order are kept on `homes` (cycled). `rehome`
        maps an instance to the one all its pages of these sequences move to."""
        rows, unit = [], 0
        for sequence, count in chunks:
            run = Run(sequence.kv_len, count)
            where = [homes[(unit + i) % len(homes)] for i in range(len(units((run,), self.cluster.page_tokens)))]
            unit += len(where)
            tokens = np.array(sequence.tokens[run.first : run.end], "<i4").tobytes()
            rows.append(
                PrefillRow(
                    sequence.request,
                    sequence.slot,
                    (run,),
                    tokens,
                    tuple(where),
                    tuple(self.page(i) for i in where),
                    run.end == len(sequence.tokens),
                    sequence.sampling,
                )
            )
        moves = self._moves([s for s, _ in chunks], rehome or {})
        bucket = prefill_bucket(unit, len(group), self.cluster.ladder, self.cluster.page_tokens)
        done = self.run(RunPrefill(self.next_step(), group, bucket, form, tuple(rows), moves))
        self._apply(moves, {s.request: s for s, _ in chunks})
        emitted = iter(zip(done.tokens, done.logprobs, strict=True))
        for (sequence, _), row in zip(chunks, rows, strict=True):
            for home, page, cut in zip(row.homes, row.pages, units(row.runs, self.cluster.page_tokens), strict=True):
                sequence.homes[home][page] = cut
            sequence.kv_len = row.runs[-1].end
            if row.emit:
                token, logprob = next(emitted)
                sequence.tokens.append(token)
                sequence.logprobs.append(logprob)

    def decode(self, group: tuple[int, ...], rows: list[tuple[Sequence, int]], *, on_device: bool = False) -> None:
        """One token for each (sequence, master). `on_device`: feed the token the device sampled."""
        out = []
        for sequence, master in rows:
            position = len(sequence.tokens) - 1
            page, run = self._open(sequence, master, position)
            token = -1 if on_device else sequence.tokens[-1]
            out.append(
                DecodeRow(sequence.request, sequence.slot, position, token, master, page, run, sequence.sampling)
            )
            sequence.homes[master][page] = run
            sequence.kv_len = position + 1
        most = max(sum(row.master == m for row in out) for m in group)
        bucket = decode_bucket(most, self.cluster.ladder)
        done = self.run(RunDecode(self.next_step(), group, bucket, tuple(out)))
        for (sequence, _), token, logprob in zip(rows, done.tokens, done.logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)

    def migrate(self, sequence: Sequence, src: int, dst: int) -> None:
        moves = self._moves([sequence], {src: dst})[: self.cluster.ladder.move_pages]
        self.run(Migrate(self.next_step(), tuple(sorted((src, dst))), moves))
        self._apply(moves, {sequence.request: sequence})

    def free(self, sequence: Sequence) -> None:
        self.executor.submit(Free(sequence.request, tuple(sequence.holders())))
        for instance, pages in enumerate(sequence.homes):
            self._free[instance] += pages
            pages.clear()

    def _open(self, sequence: Sequence, master: int, position: int) -> tuple[int, Run]:
        for page, run in sequence.homes[master].items():
            if run.end == position and run.count < self.cluster.page_tokens:
                return page, Run(run.first, run.count + 1)
        return self.page(master), Run(position, 1)

    def _moves(self, sequences: list[Sequence], rehome: dict[int, int]) -> tuple[PageMove, ...]:
        return tuple(
            PageMove(sequence.request, src, page, dst, self.page(dst), run)
            for sequence in sequences
            for src, dst in rehome.items()
            for page, run in sequence.homes[src].items()
        )

    def _apply(self, moves: tuple[PageMove, ...], by_request: dict[int, Sequence]) -> None:
        for move in moves:
            homes = by_request[move.request].homes
            del homes[move.src][move.src_page]
            homes[move.dst][move.dst_page] = move.run
            self._free[move.src].append(move.src_page)
