"""The mirror of adjusted requests: what it is told once counts once, and what a request may need is known before."""

import numpy as np
import pytest

from loong_jax.config import ClusterConfig
from loong_jax.esp.layout import adjust_layout, step_shape
from loong_jax.row_adjust import BAN, BEFORE, TOKEN, RowAdjust, max_entries
from loong_jax.types import Adjust, Adjustment, Phase, Program

SHAPE = step_shape(Program(Phase.DECODE, 2, 2), ClusterConfig(8), "cpu", 100)
LAYOUT = adjust_layout(SHAPE, 2)


def mirror(adjustment: Adjustment, prompt=(1, 2, 3), stop_ids=()) -> RowAdjust:
    ids = np.array(prompt, "<i4").tobytes()
    return RowAdjust(Adjust(0, adjustment, ids, len(prompt), stop_ids), 100)


def written(mirror: RowAdjust, position: int) -> dict[str, np.ndarray]:
    fields = LAYOUT.views(np.zeros((2, LAYOUT.size), np.int32))
    mirror.write(fields, (1, 0), position)
    assert not any(view[0].any() or view[1, 1].any() for view in fields.values()), "only its own row"
    return {name: view[1, 0] for name, view in fields.items()}


def test_a_gap_is_our_bug():
    with pytest.raises(AssertionError):
        mirror(Adjustment(presence_penalty=1.0)).observe(4, 9)


def test_what_needs_no_history_is_told_nothing():
    late = mirror(Adjustment(logit_bias=((5, 1.0),)))
    late.observe(70, -1)  # one step late: the host does not know the token
    assert late.num_entries == 1


class _GaveUp:
    """A matcher that allows even tokens, until it is told one that is odd."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, token: int) -> None:
        self.taken.append(token)

    def allowed(self) -> np.ndarray | None:
        return None if any(token % 2 for token in self.taken) else np.full(5, 0x55555555, np.uint32)


def test_a_grammar_is_told_the_answer_and_not_the_prompt_and_each_token_once():
    matcher = _GaveUp()
    row = RowAdjust(Adjust(0, Adjustment(grammar="even"), b"", 3, ()), 100, matcher)
    for position, token in ((2, 7), (3, 4), (3, 4), (4, 8)):
        row.observe(position, token)
    assert matcher.taken == [4, 8]
    fields = written(row, 5)
    assert fields["constrained"] == 1
    bits = np.unpackbits(fields["allowed"].copy().view(np.uint8), bitorder="little").reshape(-1, 32).T.reshape(-1)
    assert np.flatnonzero(bits[:100]).tolist() == list(range(0, 100, 2))
    row.observe(5, 9)
    assert written(row, 6)["constrained"] == 0, "where the matcher gave up, any token may come"


def test_bans_end_with_min_tokens():
    row = mirror(Adjustment(logit_bias=((7, 2.0), (8, -1.0)), min_tokens=2), stop_ids=(9, 8))
    for position, banned in ((3, True), (4, True), (5, False)):
        fields = written(row, position)
        assert fields["num_entries"] == 3
        assert fields["entries"][TOKEN, :3].tolist() == [9, 8, 7]
        before = fields["entries"][BEFORE, :3].copy().view(np.float32).tolist()
        assert before == ([np.float32(BAN), np.float32(BAN), 2.0] if banned else [0.0, -1.0, 2.0])


@pytest.mark.parametrize(
    ("adjustment", "stop_ids", "max_tokens", "expected"),
    [
        (Adjustment(repetition_penalty=2.0), (), 5000, 0),  # a bit for each token of the vocabulary, whatever the text
        (Adjustment(logit_bias=((1, 1.0), (2, 1.0))), (2, 3), 50, 2),
        (Adjustment(logit_bias=((1, 1.0), (2, 1.0)), min_tokens=1), (2, 3), 50, 3),
        (Adjustment(presence_penalty=1.0), (), 50, 49),  # the last one is never followed
        (Adjustment(frequency_penalty=1.0, min_tokens=1), (2, 3), 50, 51),
        (Adjustment(frequency_penalty=1.0), (), 5000, 100),
    ],
)
def test_most_entries_are_known_before(adjustment, stop_ids, max_tokens, expected):
    assert max_entries(adjustment, stop_ids, max_tokens, 100) == expected
