"""Scaling down is free: a prompt prefilled on eight instances ends on two, and no byte more is sent than otherwise.

The real manager and policy drive the real executor; what they command and stage is recorded. Compared with a policy
that is the same but keeps all KV even. Scaling up: `esp/test_decode.py`. Memory: `esp/test_steps.py`.
"""

import queue
from typing import NamedTuple

import jax
import msgspec
import numpy as np
import pytest

from loong_jax.aot.collectives import KINDS, traffic_of
from loong_jax.aot.compiled import compile_step
from loong_jax.config import LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.esp.layout import prefill_layout
from loong_jax.manager import Manager
from loong_jax.policy.elastic import Elastic
from loong_jax.staging import stage_prefill
from loong_jax.types import (
    AnyCommand,
    Arrived,
    ContextForm,
    Emit,
    Finish,
    Free,
    Migrate,
    Phase,
    Plan,
    PlannedPrefill,
    Program,
    ProgramReady,
    RunDecode,
    RunPrefill,
    Sampling,
    Share,
)
from tests.support.plane import CLUSTER, data_plane

EVERYONE = tuple(range(8))
CHUNK_TOKENS, NUM_CHUNKS, NUM_TOKENS = 256, 16, 6
LIMITS = LimitsConfig(chunk_tokens=CHUNK_TOKENS)
# Large groups pay at once, and context circulates: like with like.
COST = unmeasured(prefill_hop_s=0.0, gather_token_s=1.0)
PREFILL = Program(Phase.PREFILL, 8, 64)


class EvenPolicy:
    """The elastic policy, but KV is spread over the whole group to the end."""

    def __init__(self):
        self._inner = Elastic(CLUSTER, LIMITS)

    def plan(self, view, cost) -> Plan:
        plan = self._inner.plan(view, cost)
        return msgspec.structs.replace(plan, prefills=tuple(map(self._even, plan.prefills)))

    @staticmethod
    def _even(planned: PlannedPrefill) -> PlannedPrefill:
        num_units = sum(share.pages for share in planned.keep)
        each, more = divmod(num_units, len(planned.instances))
        keep = tuple(Share(i, each + (r < more)) for r, i in enumerate(planned.instances) if each + (r < more))
        return msgspec.structs.replace(planned, keep=keep, rehome=())


class Recording(NamedTuple):
    commands: list[AnyCommand]
    trips: list[tuple[int, int]]  # of each chunk: ring tiles, query tiles
    tokens: list[int]
    logprobs: list[float]
    prompt: list[int]


def drive(policy) -> Recording:
    """One request of sixteen chunks through manager and executor, to its end."""
    data, inbox = data_plane(), queue.SimpleQueue()
    executor, manager = data.executor(inbox.put), Manager(CLUSTER, LIMITS, policy, COST)
    recording = Recording([], [], [], [], np.random.default_rng(1).integers(3, 512, NUM_CHUNKS * CHUNK_TOKENS).tolist())
    layout = prefill_layout(data.builder.shape(PREFILL))
    finished = False

    def handle(event) -> None:
        nonlocal finished
        for command in manager.handle(event, len(recording.commands)):
            recording.commands.append(command)
            if isinstance(command, RunPrefill):
                staged = stage_prefill(command, data.builder.shape(PREFILL), executor._tables)
                fields = layout.views(staged.packed)
                recording.trips.append((int(fields["num_ring_tiles"][0]), int(fields["num_query_tiles"][0])))
            if isinstance(command, Emit):
                recording.tokens.extend(command.tokens)
                recording.logprobs.extend(command.logprobs)
            finished |= isinstance(command, Finish)
            executor.submit(command)
        manager.check()

    before = executor.states.pool_pointers()
    for program in (PREFILL, Program(Phase.DECODE, 8, 4)):
        handle(ProgramReady(program, EVERYONE))
    for pair in ((0, 1), (2, 3), (4, 5), (6, 7)):
        handle(ProgramReady(Program(Phase.DECODE, 2, 4), pair))
    handle(Arrived(0, np.array(recording.prompt, "<i4").tobytes(), NUM_TOKENS, Sampling()))
    while not finished:
        handle(inbox.get(timeout=120))
    assert executor.states.pool_pointers() == before
    executor.close()
    return recording


@pytest.fixture(scope="module")
def packed() -> Recording:
    return drive(Elastic(CLUSTER, LIMITS))


@pytest.fixture(scope="module")
def even() -> Recording:
    return drive(EvenPolicy())


def prefills(recording: Recording) -> list[RunPrefill]:
    return [command for command in recording.commands if isinstance(command, RunPrefill)]


def test_the_last_chunk_packs_and_nothing_migrates(packed: Recording):
    """Fifteen even chunks, then one that moves all context to the two instances that decode."""
    chunks = prefills(packed)
    assert len(chunks) == NUM_CHUNKS
    assert not any(isinstance(command, Migrate) for command in packed.commands)
    for chunk in chunks[:-1]:
        assert chunk.instances == EVERYONE
        assert not chunk.moves
        pages = [chunk.rows[0].homes.count(i) for i in EVERYONE]
        assert max(pages) == min(pages) == 2
    last = chunks[-1]
    assert last.instances == EVERYONE
    assert last.form is ContextForm.RING
    kept = set(last.rows[0].homes) | {move.dst for move in last.moves}
    assert len(kept) == 2
    assert {move.src for move in last.moves} == set(EVERYONE) - kept
    assert len(last.moves) == 6 * 2 * (NUM_CHUNKS - 1)
    decodes = [command for command in packed.commands if isinstance(command, RunDecode)]
    assert decodes
    assert {frozenset(command.instances) for command in decodes} == {frozenset(kept)}
    [freed] = [command for command in packed.commands if isinstance(command, Free)]
    assert set(freed.instances) == kept, "KV lies nowhere else"


def test_tokens_are_the_oracles_either_way(packed: Recording, even: Recording):
    judge = data_plane().judge
    for recording in (packed, even):
        assert len(recording.tokens) == NUM_TOKENS
        judge.check(recording.prompt, recording.tokens, recording.logprobs, Sampling())
    assert packed.tokens == even.tokens


def test_each_chunk_sends_what_the_even_placement_sends(packed: Recording, even: Recording):
    """The same executable with the same trip counts: the same collectives, of the same bytes."""
    assert [(c.instances, c.bucket, c.form) for c in prefills(packed)] == [
        (c.instances, c.bucket, c.form) for c in prefills(even)
    ]
    data = data_plane()
    compiled = compile_step(data.model, CLUSTER, PREFILL, jax.devices(), "cpu")
    traffic = traffic_of(compiled.as_text())
    for index, (one, other) in enumerate(zip(packed.trips, even.trips, strict=True)):
        assert traffic.total(*one) == traffic.total(*other)
        assert one == (-(-2 * 16 * index // CLUSTER.ring_tokens), 0)
        numbers, num_bytes = traffic.total(*one)
        # a hop: K and V of a block, and what is needed to mask and keep it
        hops = data.model.num_layers * (len(EVERYONE) - 1) * (1 + one[0])
        kv_bytes = 2 * 64 * data.model.num_kv_heads * data.model.head_dim * 4
        assert numbers["collective-permute"] == 3 * hops  # K, V, and where they belong
        assert num_bytes["collective-permute"] == hops * (kv_bytes + 4 * 4 * 4)
        assert {kind for kind in KINDS if numbers[kind]} == {"collective-permute", "all-reduce"}
