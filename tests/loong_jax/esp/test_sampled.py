"""What steps give for their rows and for the tokens they score, at DoP 1 and 3, against the oracle."""

import numpy as np
import pytest

from loong_jax.types import Adjustment, ContextForm, Sampling
from tests.support.plane import TP2, Plane, steady_plane

EVERYTHING = Adjustment(((3, 4.0), (9, -100.0)), 4, 1.3, 0.4, 0.3)
WARM = Sampling(temperature=0.9, top_p=0.9, min_p=0.02, seed=5, num_top=4)


@pytest.fixture
def plane():
    with steady_plane() as plane:
        yield plane


@pytest.mark.parametrize("group", [(2,), (0, 1, 2)])
def test_adjusted_rows_beside_plain_ones(plane: Plane, group: tuple[int, ...]):
    """Penalties, bans, biases and likeliest tokens of some rows; the others do not notice."""
    batch = [
        plane.sequence(40, Sampling(num_top=20), EVERYTHING, stop_ids=(1, 2, 3)),
        plane.sequence(17),
        plane.sequence(8, WARM, Adjustment(repetition_penalty=0.7)),
        plane.sequence(5, Sampling(temperature=1.0, min_p=0.1, seed=2), Adjustment(((7, 100.0),))),
    ]
    homes = [group[i % len(group)] for i in range(4)]
    for sequence, home in zip(batch, homes, strict=True):
        plane.prefill(group, [(sequence, sequence.prompt_len)], [home])
    for _ in range(8):
        plane.decode(group, list(zip(batch, homes, strict=True)))
    assert batch[3].generated == [7] * 9, "biased to one token"
    assert not {1, 2, 3} & set(batch[0].generated[:4])
    assert [len(sequence.tops) for sequence in batch] == [9, 0, 9, 0]
    plane.check(*batch)


@pytest.mark.parametrize("group", [(4,), (1, 2, 3)])
@pytest.mark.parametrize("num_top", [0, 5])
def test_prompts_are_scored_chunk_by_chunk(plane: Plane, group: tuple[int, ...], num_top: int):
    """Two prompts in one batch, in chunks that end within a page, in both context forms."""
    a, b = plane.sequence(150), plane.sequence(21)
    chunk = 30 * len(group)
    plane.prefill(group, [(a, min(chunk, 45)), (b, 1)], list(group), score=num_top)
    form = ContextForm.GATHER_Q
    while not a.generated:
        left = sum(run.count for run in a.missing())
        rows = [(a, min(left, chunk))] + ([] if b.generated else [(b, 20)])
        plane.prefill(group, rows, list(group), form, score=num_top)
        form = ContextForm.RING
    for sequence in (a, b):
        scores = [part for part in sequence.scores if part.logprobs]
        # the last one speaks of a token nobody knows
        scores[-1] = scores[-1].part(0, len(scores[-1].logprobs) // 4 - 1)
        plane.data.judge.check_scores(sequence.tokens[: sequence.prompt_len], scores, num_top)
        plane.decode(group, [(sequence, group[-1])])
    plane.check(a, b)


def test_penalties_follow_a_request_to_other_masters_and_back_from_an_eviction(plane: Plane):
    sequence = plane.sequence(20, Sampling(temperature=1.0, seed=3), EVERYTHING, stop_ids=(5,))
    plane.prefill((0, 1, 2), [(sequence, 20)], [0])
    for master in (1, 2, 0):
        plane.decode((0, 1, 2), [(sequence, master)])
    plane.free(sequence)
    plane.prefill((4,), [(sequence, len(sequence.tokens))], [4])
    plane.decode((4,), [(sequence, 4)])
    assert len(set(sequence.generated)) > 1
    plane.check(sequence)


def test_on_two_devices_each():
    """A vocabulary in two halves: scores, likeliest tokens and penalties are those of the whole."""
    with steady_plane("gqa", TP2) as plane:
        sequence = plane.sequence(40, Sampling(num_top=7), EVERYTHING, stop_ids=(4,))
        plane.prefill((0, 1), [(sequence, 40)], [0, 1], score=3)
        plane.decode((0, 1), [(sequence, 1)])
        (scores,) = sequence.scores
        plane.data.judge.check_scores(sequence.tokens[:40], [scores.part(0, 39)], 3)
        plane.check(sequence)


def test_scores_are_read_as_they_lie():
    from loong_jax.types import Scores

    f4, i4 = (np.arange(6, dtype="<f4"), np.arange(12, dtype="<i4"))
    scores = Scores(f4.tobytes(), 2, i4.tobytes(), i4.astype("<f4").tobytes())
    part = scores.part(2, 3)
    assert np.frombuffer(part.logprobs, "<f4").tolist() == [2, 3, 4]
    assert np.frombuffer(part.top_tokens, "<i4").tolist() == [4, 5, 6, 7, 8, 9]
    assert np.frombuffer(part.top_logprobs, "<f4").tolist() == [4, 5, 6, 7, 8, 9]
