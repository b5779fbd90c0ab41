"""Performs the manager's commands on devices. `submit` never waits for a device; completions come back as events.

A step is staged (`staging.py`), its group's view taken (`instance_states.py`), its program called (`programs.py`), and
its small sampled output handed to a reader thread that waits for it and posts `StepDone`. The thread that submits is
the only one that dispatches, so every device sees one order of programs. The same object serves a single host and the
worker of another host: it joins the steps whose group holds one of its devices and keeps its tables for all.

What it is not: a scheduler, or an owner of requests (`manager.py`).
"""

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from loong_jax.config import ClusterConfig
from loong_jax.esp.groups import Devices
from loong_jax.esp.layout import NOWHERE, adjust_layout_of
from loong_jax.esp.steps import StepBuilder
from loong_jax.grammar import Grammars, TokenMatcher
from loong_jax.instance_states import Group, GroupWeights, InstanceStates
from loong_jax.page_table import PageTables
from loong_jax.programs import Programs
from loong_jax.row_adjust import RowAdjust
from loong_jax.staging import Output, Staged, stage_decode, stage_prefill, stage_transfer
from loong_jax.types import (
    Adjust,
    AnyCommand,
    AnyEvent,
    CopyPages,
    Forget,
    Fork,
    Free,
    Migrate,
    Phase,
    Prepare,
    Program,
    RequestFailed,
    Reset,
    RunDecode,
    RunPrefill,
    Scores,
    Slide,
    StepCommand,
    StepDone,
    StepFailed,
    Top,
    Truncate,
)

Uploads = list[tuple[int, np.ndarray]]
"""(rank, page table) of the members whose table changed too much for deltas."""


class Executor:
    """One per process. `post` is called from the reader and compile threads."""

    def __init__(
        self,
        builder: StepBuilder,
        devices: Devices,
        weights: list[list],
        programs: Programs,
        post: Callable[[AnyEvent], None],
        grammars: Grammars | None = None,
    ):
        self._grammars = grammars
        self._builder, self._devices, self._programs, self._post = builder, devices, programs, post
        cluster = builder.cluster
        self._cluster: ClusterConfig = cluster
        self._weights = GroupWeights(devices, weights)
        self.states = InstanceStates(devices, builder.model, cluster, builder.platform)
        self._tables = PageTables(cluster.num_instances, cluster.table_entries, cluster.page_tokens)
        self._shapes = {program: builder.shape(program) for program in cluster.ladder.programs()}
        self._adjusts: dict[int, RowAdjust] = {}
        self._no_moves: dict[Group, jax.Array] = {}
        self._no_adjust: dict[tuple[Group, int], jax.Array] = {}
        self._zeros: dict[tuple[int, int], list[jax.Array]] = {}
        self._outputs: queue.SimpleQueue = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_outputs, name="loong-reader", daemon=True)
        self._reader.start()

    def submit(self, command: AnyCommand) -> None:
        match command:
            case RunPrefill() | RunDecode() | Migrate() | CopyPages():
                self._run(command)
            case Free() | Truncate() | Slide() | Fork():
                self._tables.apply(command)
            case Reset():
                self.states.reset(command.instances)
                self._tables.apply(command)
            case Adjust():
                vocab_size = self._builder.model.vocab_size
                self._adjusts[command.request] = RowAdjust(command, vocab_size, self._matcher(command))
            case Forget():
                del self._adjusts[command.request]
            case Prepare():
                self._programs.prepare(command.program, command.instances)
            case _:
                pass  # Emit, Finish and Reject are for the client

    def close(self) -> None:
        self._outputs.put(None)
        self._reader.join()

    def _matcher(self, command: Adjust) -> TokenMatcher | None:
        request, grammar = command.request, command.adjustment.grammar
        if not grammar:
            return None
        assert self._grammars is not None, "a grammar is admitted only where all processes know grammars"
        return self._grammars.matcher(grammar, lambda reason: self._post(RequestFailed(request, reason)))

    def _run(self, command: StepCommand) -> None:
        program, instances = self._program_of(command)
        staged, uploads = self._stage(command, program)
        if not self._devices.is_local(instances):
            return
        try:
            sampled = self._call(program, instances, staged, uploads)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises, the donated pools are gone
            self._post(StepFailed(command.step, instances, f"{type(error).__name__}: {error}"))
            return
        if self._devices.is_local(instances[:1]):
            self._outputs.put((command.step, instances, sampled, staged.output))

    def _program_of(self, command: StepCommand) -> tuple[Program, Group]:
        move_pages = self._cluster.ladder.move_pages
        match command:
            case RunPrefill():
                return Program(command.phase, len(command.instances), command.bucket), command.instances
            case RunDecode():
                return Program(Phase.DECODE, len(command.instances), command.bucket), command.instances
            case Migrate():
                return Program(Phase.MIGRATE, 2, move_pages), command.instances
            case CopyPages():
                return Program(Phase.COPY, 1, move_pages), (command.instance,)

    def _stage(self, command: StepCommand, program: Program) -> tuple[Staged, Uploads]:
        """Stage the step and let the page tables know of it, in the order its reads demand."""
        shape = self._shapes[program]
        if isinstance(command, RunPrefill):
            staged = stage_prefill(command, shape, self._tables, self._adjusts)
            uploads = self._take_deltas(command.instances, staged)
            self._tables.apply(command)
            return staged, uploads
        self._tables.apply(command)
        if isinstance(command, RunDecode):
            staged = stage_decode(command, shape, self._tables, self._adjusts)
        else:
            staged = stage_transfer(command, shape)
        return staged, self._take_deltas(self._program_of(command)[1], staged)

    def _take_deltas(self, instances: Group, staged: Staged) -> Uploads:
        uploads = []
        for rank, instance in enumerate(instances):
            table = self._tables.tables[instance]
            if not table.take_deltas(staged.deltas[rank]):
                uploads.append((rank, table.upload()))
        return uploads

    def _call(self, program: Program, instances: Group, staged: Staged, uploads: Uploads) -> list[jax.Array]:
        """The step's small outputs."""
        compiled = self._programs.get(program, instances) or self._programs.compile(program, instances)
        for rank, entries in uploads:
            if self._devices.is_local((instances[rank],)):
                self.states.take(instances)
                self.states.upload_table(instances, rank, entries)
        packed = self._devices.argument(instances, staged.packed)
        state = self.states.take(instances)
        match program.phase:
            case Phase.PREFILL | Phase.SCORE:
                if staged.moves is None:
                    moves = self._no_moves_of(instances)
                else:
                    moves = self._devices.argument(instances, staged.moves)
                adjust = self._adjust_of(program, instances, staged)
                state, *sampled = compiled(self._weights.view(instances), state, packed, adjust, moves)
            case Phase.DECODE:
                adjust = self._adjust_of(program, instances, staged)
                state, *sampled = compiled(self._weights.view(instances), state, packed, adjust)
            case _:
                state, *sampled = compiled(state, packed)
        self.states.put(instances, state)
        return sampled

    def _adjust_of(self, program: Program, instances: Group, staged: Staged) -> np.ndarray | jax.Array:
        """The adjustments of a step's rows. Blank ones lie on the devices, once per instance and size."""
        if staged.adjust is not None:
            return self._devices.argument(instances, staged.adjust)
        size = adjust_layout_of(program.phase, self._shapes[program]).size
        key = (instances, size)
        if key not in self._no_adjust:
            shards = [shard for i in instances for shard in self._zeros_of(i, size)]
            self._no_adjust[key] = self._devices.assemble(instances, P("sp"), (len(instances), size), shards)
        return self._no_adjust[key]

    def _zeros_of(self, instance: int, size: int) -> list[jax.Array]:
        key = (instance, size)
        if key not in self._zeros:
            local = [d for d in self._devices.by_instance[instance] if d.process_index == self._devices.process_index]
            self._zeros[key] = [jax.device_put(np.zeros((1, size), np.int32), device) for device in local]
        return self._zeros[key]

    def _no_moves_of(self, instances: Group) -> jax.Array:
        if instances not in self._no_moves:
            none = np.full((len(instances), self._cluster.table_entries), NOWHERE, np.int32)
            self._no_moves[instances] = self._devices.resident(instances, none)
        return self._no_moves[instances]

    def _read_outputs(self) -> None:
        while (item := self._outputs.get()) is not None:
            step, instances, sampled, output = item
            try:
                read = [np.asarray(array.addressable_shards[0].data) for array in sampled]
            except Exception as error:  # noqa: BLE001 - an asynchronous failure of the step shows here
                self._post(StepFailed(step, instances, f"{type(error).__name__}: {error}"))
                continue
            self._post(_step_done(step, read, output))


def _step_done(step: int, read: list[np.ndarray], output: Output) -> StepDone:
    """`read`: the sampled rows, and of a scoring prefill the scores (`esp/sampled.py`)."""
    tokens, logprobs, tops = (), (), ()
    if len(output.rows):
        rows = read[0][output.rows]
        tokens = tuple(rows[:, 0].tolist())
        logprobs = tuple(rows[:, 1].copy().view(np.float32).tolist())
        if output.num_tops:
            tops = tuple(_top(row[2:], k) for row, k in zip(rows, output.num_tops, strict=True))
    scores = tuple(_scores(read[1][index], k) for index, k in output.scored)
    return StepDone(step, tokens, logprobs, tops, scores)


def _top(row: np.ndarray, k: int) -> Top | None:
    tokens, bits = np.split(row, 2)
    return Top(tuple(tokens[:k].tolist()), tuple(bits[:k].view(np.float32).tolist())) if k else None


def _scores(rows: np.ndarray, k: int) -> Scores:
    tokens, bits = np.split(rows[:, 1:], 2, axis=1)
    logprobs, tops = rows[:, 0].astype("<i4").tobytes(), bits[:, :k].astype("<i4").tobytes()
    return Scores(logprobs, k, tokens[:, :k].astype("<i4").tobytes(), tops)
