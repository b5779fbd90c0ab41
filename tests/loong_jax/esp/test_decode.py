"""Decode of any rows by any masters over any group, against the oracle; scaling up moves nothing."""

import numpy as np
import pytest

from loong_jax.types import ContextForm, Sampling
from tests.support.plane import CLUSTER, TP2, TP4, Plane, steady_plane


@pytest.fixture
def plane():
    with steady_plane() as plane:
        yield plane


def test_masters_and_groups_change_each_step(plane: Plane):
    """KV of one request grows on every instance in turn, on groups of 1, 2, 3, 4 and 8."""
    sequence = plane.sequence(100)
    plane.prefill((2,), [(sequence, 60)], [2])
    plane.prefill((2,), [(sequence, 40)], [2])
    for group, master in [
        ((2,), 2),
        ((2, 5), 5),
        ((2, 5), 2),
        ((1, 2, 5), 1),
        ((1, 2, 5), 5),
        ((0, 1, 2, 5), 0),
        (tuple(range(8)), 7),
        (tuple(range(8)), 3),
        (tuple(range(8)), 0),
    ]:
        plane.decode(group, [(sequence, master)])
    assert sequence.holders() == {0, 1, 2, 3, 5, 7}
    plane.check(sequence)


def test_rows_of_several_masters(plane: Plane):
    """Six rows, as many as a master takes and fewer; contexts of one token and of many tiles; masters without rows."""
    group = (0, 1, 2)
    batch = [plane.sequence(n, Sampling(seed=n)) for n in (1, 16, 17, 31, 180)]
    batch.append(plane.sequence(33, Sampling(temperature=0.9, top_k=8, seed=5)))
    for i, sequence in enumerate(batch):
        plane.prefill(group, [(sequence, sequence.prompt_len)], [group[i % 3]])
    masters = [[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 2, 2], [2, 1, 0, 2, 1, 0]]
    for row in masters:
        plane.decode(group, list(zip(batch, row, strict=True)))
    plane.decode(group, [(batch[4], 2), (batch[1], 0)])
    plane.check(*batch)


def test_pages_fill_up(plane: Plane):
    """More tokens than a page holds, all on one master."""
    sequence = plane.sequence(14)
    plane.prefill((4,), [(sequence, 14)], [4])
    for _ in range(CLUSTER.page_tokens + 4):
        plane.decode((4,), [(sequence, 4)])
    assert sorted(run.count for run in sequence.homes[4].values()) == [2, 16, 16]
    plane.check(sequence)


def test_tokens_are_fed_on_the_device(plane: Plane):
    """What a group sampled, each member knows: any of them can go on without the host, also in another group."""
    a, b, c = plane.sequence(20), plane.sequence(30), plane.sequence(40)
    plane.prefill((0, 1, 2), [(a, 20), (b, 30)], [0, 1])
    plane.prefill((5,), [(c, 40)], [5])
    plane.decode((0, 1, 2), [(a, 2), (b, 0)], on_device=True)
    plane.decode((0, 1, 2), [(a, 1), (b, 2)], on_device=True)
    plane.decode((0, 1, 2, 5), [(c, 5), (a, 1)], on_device=True)  # c and a meet
    plane.decode((0, 1, 2, 5), [(c, 0), (b, 1)], on_device=True)  # b was left alone meanwhile
    plane.check(a, b, c)


def test_steps_queue_up(plane: Plane):
    """A step is issued before the host has read the one before; two groups at a time."""
    a, b = plane.sequence(20), plane.sequence(50)
    plane.prefill((0, 1), [(a, 20)], [0, 1])
    plane.prefill((2, 3), [(b, 50)], [2, 3])
    issued = []
    for step in range(6):
        issued.append(plane.issue(plane.decode_command((0, 1), [(a, step % 2)], on_device=True), (a,)))
        issued.append(plane.issue(plane.decode_command((2, 3), [(b, 2)], on_device=True), (b,)))
    for step in issued:
        plane.finish(step)
    assert len(a.generated) == len(b.generated) == 7
    plane.check(a, b)


def test_after_truncation(plane: Plane):
    """A stop found late: KV beyond it is dropped, within a page and in whole pages, and written anew."""
    group = (0, 1)
    sequence = plane.sequence(30)
    plane.prefill(group, [(sequence, 30)], [0, 1])
    for step in range(5):
        plane.decode(group, [(sequence, step % 2)])
    tokens = list(sequence.tokens)
    plane.truncate(sequence, 32)
    for step in range(4):
        plane.decode(group, [(sequence, (step + 1) % 2)])
    assert sequence.tokens == tokens
    plane.check(sequence)


def changed_slots(before: np.ndarray, after: np.ndarray) -> set[tuple[int, ...]]:
    """(layer, page, slot) of what differs between two pools."""
    return {tuple(map(int, at)) for at in np.argwhere((before != after).any(axis=(2, 3, 5)))}


@pytest.mark.parametrize("master", [1, 6])
def test_scaling_up_moves_no_kv(plane: Plane, master):
    """Instances join a group: each pool stays as it is, but for the one new slot of each layer on the master, be it
    an old member or a new one."""
    sequence = plane.sequence(70)
    plane.prefill((0, 1), [(sequence, 70)], [0, 1])
    plane.decode((0, 1), [(sequence, 0)])
    before, pointers = plane.pools(), plane.executor.states.pool_pointers()
    assert plane.data.model.num_layers == 3
    command = plane.decode((0, 1, 6, 7), [(sequence, master)])
    after = plane.pools()
    [row] = command.rows
    for instance in range(CLUSTER.num_instances):
        expected = {(layer, row.page, row.run.count - 1) for layer in range(3)} if instance == master else set()
        assert changed_slots(before[instance][0], after[instance][0]) == expected
    assert plane.executor.states.pool_pointers() == pointers
    assert not (np.array(after[7][0])).any(), "the added instance without rows holds nothing"
    plane.check(sequence)


def test_bf16_on_two_devices_each():
    with steady_plane("bf16", TP2) as plane:
        sequence, neighbour = plane.sequence(90), plane.sequence(3)
        plane.prefill((0, 2), [(sequence, 90), (neighbour, 3)], [0, 2])
        for step in range(4):
            plane.decode((0, 2), [(sequence, 2 * (step % 2)), (neighbour, 2)], on_device=step > 1)
        pools = plane.pools()
        assert pools[0][0].dtype == np.uint16
        assert (pools[0][0] != pools[0][1]).any(), "each rank keeps its own head"
        plane.check(sequence, neighbour, tolerance=0.1, tie=0.2)


def test_more_devices_than_kv_heads():
    with steady_plane("gqa", TP4) as plane:
        sequence, neighbour = plane.sequence(60), plane.sequence(20)
        plane.prefill((0, 1), [(sequence, 60)], [0, 1])
        plane.prefill((0, 1), [(neighbour, 20)], [1], ContextForm.GATHER_Q)
        for step in range(3):
            plane.decode((0, 1), [(neighbour, 1), (sequence, step % 2)], on_device=step > 0)
        plane.check(sequence, neighbour)
