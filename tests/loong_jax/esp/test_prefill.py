"""Prefill of any chunk over any group, against the oracle: stripes, both context forms, holes, retention."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.esp.prefill import token_mask
from loong_jax.types import ContextForm, Run, Sampling
from tests.support.plane import TP2, TP4, Plane, steady_plane

RING, GATHER = ContextForm.RING, ContextForm.GATHER_Q
EIGHT = tuple(range(8))
BF16_TOLERANCE = 0.1  # KV and activations are rounded at other places


@pytest.fixture
def plane():
    with steady_plane() as plane:
        yield plane


def test_token_mask():
    units = jnp.array([[2, 5, 3, 0], [-1, -1, 0, -1], [0, 8, 4, 9]], jnp.int32)
    mask = token_mask(units, 4)
    assert np.asarray(mask.row).tolist() == [2, 2, 2, -1, -1, -1, -1, -1, 0, 0, 0, 0]
    assert np.asarray(mask.position).tolist() == [5, 6, 7, 0, 0, 0, 0, 0, 8, 9, 10, 11]


@pytest.mark.parametrize("group", [(3,), (2, 5), (0, 1, 2), EIGHT], ids=len)
def test_ragged_batch(plane: Plane, group):
    """Prompts of any lengths, units cut in their middle, all ending in one chunk."""
    lengths = (17, 3, 1) if len(group) == 1 else (41, 16, 3, 1)
    batch = [plane.sequence(length) for length in lengths]
    plane.prefill(group, [(s, s.prompt_len) for s in batch], [group[-1]])
    plane.check(*batch)


@pytest.mark.parametrize("form", [RING, GATHER])
def test_context_forms(plane: Plane, form):
    """Three chunks; context of several ring tiles, unevenly placed; several query tiles, some of them empty."""
    group = (1, 2, 6)
    sequence, neighbour = plane.sequence(400), plane.sequence(90)
    plane.prefill(group, [(sequence, 160)], [2, 2, 2, 6])
    plane.prefill(group, [(neighbour, 33), (sequence, 144)], [1, 2], form)
    plane.prefill(group, [(sequence, 96), (neighbour, 57)], [6], form)
    plane.check(sequence, neighbour)


def test_forms_agree(plane: Plane):
    prompt, logprobs = plane.sequence(300).tokens, []
    for form in (RING, GATHER):
        sequence = plane.sequence(prompt)
        plane.prefill(EIGHT, [(sequence, 270)], [0, 3, 4], form)
        plane.prefill(EIGHT, [(sequence, 30)], [7], form)
        plane.check(sequence)
        logprobs += sequence.logprobs
    assert abs(logprobs[0] - logprobs[1]) < 2e-5


@pytest.mark.parametrize("form", [RING, GATHER])
def test_holes_are_filled(plane: Plane, form):
    """Instance 1 is lost: every third page is missing. Chunks of several runs, with context on both sides."""
    group = (0, 1, 2)
    sequence = plane.sequence(210)
    plane.prefill(group, [(sequence, 190)], [0, 1, 2])
    plane.free(sequence, (1,))
    assert sequence.missing() == [Run(first, 16) for first in (16, 64, 112, 160)] + [Run(190, 20)]
    command = plane.prefill(group, [(sequence, 40)], [2], form)
    assert command.rows[0].runs == (Run(16, 16), Run(64, 16), Run(112, 8))
    command = plane.prefill(group, [(sequence, 44)], [1, 0], form)
    assert command.rows[0].runs == (Run(120, 8), Run(160, 16), Run(190, 20))
    assert command.rows[0].emit
    plane.check(sequence)


def test_all_context_moves_while_it_circulates(plane: Plane):
    """Pages of six instances are re-homed to two, among them the partial one of an earlier chunk's end."""
    sequence, neighbour = plane.sequence(500), plane.sequence(60)
    plane.prefill(EIGHT, [(sequence, 250)], list(EIGHT))
    plane.prefill(EIGHT, [(sequence, 130), (neighbour, 40)], list(EIGHT))
    targets = {0: 5, 1: 6, 2: 5, 3: 6, 4: 5, 7: 6}
    plane.prefill(EIGHT, [(sequence, 120), (neighbour, 20)], [5, 6], RING, targets)
    assert sequence.holders() == neighbour.holders() == {5, 6}
    plane.decode((5, 6), [(sequence, 5), (neighbour, 6)])
    plane.decode((5, 6), [(sequence, 6), (neighbour, 6)])
    plane.check(sequence, neighbour)


def test_instances_swap_their_pages(plane: Plane):
    """Both ends of a move are sources and targets: nothing is overwritten before it is read."""
    sequence = plane.sequence(200)
    plane.prefill((0, 1), [(sequence, 100)], [0])
    plane.prefill((0, 1), [(sequence, 60)], [1])
    plane.prefill((0, 1), [(sequence, 30)], [0, 1], RING, {0: 1, 1: 0})
    plane.prefill((0, 1), [(sequence, 10)], [0])
    plane.check(sequence)


def test_context_of_one_instance(plane: Plane):
    """All context on one instance: the others have none to show, and circulate empty tiles."""
    sequence = plane.sequence(700)
    for _ in range(3):
        plane.prefill(EIGHT, [(sequence, 200)], [3])
    plane.prefill(EIGHT, [(sequence, 100)], [0, 7], RING, {3: 0})
    assert sequence.holders() == {0, 7}
    plane.decode((0, 7), [(sequence, 7)])
    plane.check(sequence)


def test_only_planned_pages_are_written(plane: Plane):
    """The pools change in the pages named, and nowhere else."""
    group = (0, 1, 2)
    sequence = plane.sequence(100)
    plane.prefill(group, [(sequence, 64)], [0, 1])
    before = plane.pools()
    command = plane.prefill(group, [(sequence, 36)], [2, 1], RING, {0: 2})
    row = command.rows[0]
    expected = set(zip(row.homes, row.pages, strict=True)) | {(m.dst, m.dst_page) for m in command.moves}
    changed = set()
    for instance, [pool] in plane.pools().items():
        changed |= {(instance, int(p)) for p in np.flatnonzero((pool != before[instance][0]).any((0, 2, 3, 4, 5)))}
    assert changed == expected
    after = plane.pools()
    for move in command.moves:
        old, new = before[move.src][0][:, move.src_page], after[move.dst][0][:, move.dst_page]
        assert (old == new).all(), "a moved page is the same, bit by bit"


def test_sampling_does_not_depend_on_the_batch(plane: Plane):
    """Temperature, top-k, top-p and seed of each row are its own, on every DoP."""
    prompt = plane.sequence(50).tokens
    kinds = [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.8, top_k=5, seed=2),
        Sampling(temperature=1.2, top_p=0.6, seed=3),
        Sampling(),
    ]
    results = []
    for group in ((0,), (1, 2, 3), EIGHT):
        batch = [plane.sequence(prompt, sampling) for sampling in kinds]
        chunks = [(s, 48) for s in batch]
        if len(group) > 1:
            plane.prefill(group, chunks, [group[0], group[-1]])
        else:
            for chunk in chunks:
                plane.prefill(group, [chunk], [group[0]])
        plane.prefill(group, [(s, 2) for s in batch], [group[-1]], GATHER)
        plane.check(*batch)
        results.append([s.generated for s in batch])
    assert results[0] == results[1] == results[2]


def test_bf16_on_two_devices_each():
    """Storage as bit patterns; two instances of two devices."""
    with steady_plane("bf16", TP2) as plane:
        sequence, neighbour = plane.sequence(150), plane.sequence(19)
        plane.prefill((1, 3), [(sequence, 100)], [1, 3])
        plane.prefill((1, 3), [(sequence, 20), (neighbour, 19)], [1], GATHER)
        plane.prefill((1, 3), [(sequence, 30)], [3], RING, {1: 3})
        assert sequence.holders() == {3}
        plane.check(sequence, neighbour, tolerance=BF16_TOLERANCE, tie=2 * BF16_TOLERANCE)


def test_more_devices_than_kv_heads():
    """tp = 4 with two KV heads: each rank keeps one, and ranks of one head keep the same."""
    with steady_plane("gqa", TP4) as plane:
        sequence = plane.sequence(150)
        plane.prefill((0, 1), [(sequence, 90)], [0, 1])
        plane.prefill((0, 1), [(sequence, 40)], [0], GATHER)
        plane.prefill((0, 1), [(sequence, 20)], [1], RING, {0: 1})
        plane.decode((1,), [(sequence, 1)])
        plane.check(sequence)
        pools = plane.pools()[1]
        assert (pools[0] == pools[1]).all()
        assert (pools[2] == pools[3]).all()
        assert (pools[0] != pools[2]).any()
