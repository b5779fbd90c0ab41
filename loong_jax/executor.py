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

from loong_jax.config import ClusterConfig
from loong_jax.esp.groups import Devices
from loong_jax.esp.layout import NOWHERE
from loong_jax.esp.steps import StepBuilder
from loong_jax.instance_states import Group, GroupWeights, InstanceStates
from loong_jax.page_table import PageTables
from loong_jax.programs import Programs
from loong_jax.staging import Staged, stage_decode, stage_prefill, stage_transfer
from loong_jax.types import (
    AnyCommand,
    AnyEvent,
    CopyPages,
    Fork,
    Free,
    Migrate,
    Phase,
    Prepare,
    Program,
    Reset,
    RunDecode,
    RunPrefill,
    StepCommand,
    StepDone,
    StepFailed,
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
    ):
        self._builder, self._devices, self._programs, self._post = builder, devices, programs, post
        cluster = builder.cluster
        self._cluster: ClusterConfig = cluster
        self._weights = GroupWeights(devices, weights)
        self.states = InstanceStates(devices, builder.model, cluster, builder.platform)
        self._tables = PageTables(cluster.num_instances, cluster.table_entries, cluster.page_tokens)
        self._shapes = {program: builder.shape(program) for program in cluster.ladder.programs()}
        self._no_moves: dict[Group, jax.Array] = {}
        self._outputs: queue.SimpleQueue = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_outputs, name="loong-reader", daemon=True)
        self._reader.start()

    def submit(self, command: AnyCommand) -> None:
        match command:
            case RunPrefill() | RunDecode() | Migrate() | CopyPages():
                self._run(command)
            case Free() | Truncate() | Fork():
                self._tables.apply(command)
            case Reset():
                self.states.reset(command.instances)
                self._tables.apply(command)
            case Prepare():
                self._programs.prepare(command.program, command.instances)
            case _:
                pass  # Emit, Finish and Reject are for the client

    def close(self) -> None:
        self._outputs.put(None)
        self._reader.join()

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
            self._outputs.put((command.step, instances, sampled, staged.rows))

    def _program_of(self, command: StepCommand) -> tuple[Program, Group]:
        move_pages = self._cluster.ladder.move_pages
        match command:
            case RunPrefill():
                return Program(Phase.PREFILL, len(command.instances), command.bucket), command.instances
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
            staged = stage_prefill(command, shape, self._tables)
            uploads = self._take_deltas(command.instances, staged)
            self._tables.apply(command)
            return staged, uploads
        self._tables.apply(command)
        if isinstance(command, RunDecode):
            staged = stage_decode(command, shape, self._tables)
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

    def _call(self, program: Program, instances: Group, staged: Staged, uploads: Uploads) -> jax.Array:
        compiled = self._programs.get(program, instances) or self._programs.compile(program, instances)
        for rank, entries in uploads:
            if self._devices.is_local((instances[rank],)):
                self.states.take(instances)
                self.states.upload_table(instances, rank, entries)
        packed = self._devices.argument(instances, staged.packed)
        state = self.states.take(instances)
        match program.phase:
            case Phase.PREFILL:
                if staged.moves is None:
                    moves = self._no_moves_of(instances)
                else:
                    moves = self._devices.argument(instances, staged.moves)
                state, sampled = compiled(self._weights.view(instances), state, packed, moves)
            case Phase.DECODE:
                state, sampled = compiled(self._weights.view(instances), state, packed)
            case _:
                state, sampled = compiled(state, packed)
        self.states.put(instances, state)
        return sampled

    def _no_moves_of(self, instances: Group) -> jax.Array:
        if instances not in self._no_moves:
            none = np.full((len(instances), self._cluster.table_entries), NOWHERE, np.int32)
            self._no_moves[instances] = self._devices.resident(instances, none)
        return self._no_moves[instances]

    def _read_outputs(self) -> None:
        while (item := self._outputs.get()) is not None:
            step, instances, sampled, rows = item
            try:
                read = np.asarray(sampled.addressable_shards[0].data)
            except Exception as error:  # noqa: BLE001 - an asynchronous failure of the step shows here
                self._post(StepFailed(step, instances, f"{type(error).__name__}: {error}"))
                continue
            tokens, logprobs = (), ()
            if len(rows):
                read = read[rows]
                tokens = tuple(read[:, 0].tolist())
                logprobs = tuple(read[:, 1].copy().view(np.float32).tolist())
            self._post(StepDone(step, tokens, logprobs))
