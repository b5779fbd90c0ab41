"""Golden scenarios: a rule each, as events and the decisions that follow. `pytest --rewrite` redraws them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loong_jax.policy.describe import describe
from loong_jax.types import Plan, PlannedDecode, PlannedDecodeRow, PlannedEvict, Reservation
from tests.support.golden import Scenario, rewritten
from tests.support.views import decoding, draft, instance

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    found = rewritten(path)
    if request.config.getoption("--rewrite"):
        path.write_text(found)
    assert path.read_text() == found, f"{path.name}: look at the difference; pytest --rewrite accepts it"


def test_every_step_has_its_scenarios() -> None:
    steps = {path.stem.partition("_")[0] for path in GOLDEN}
    assert {"dispatch", "allocate", "batch", "scale"} <= steps


def test_a_script_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="cannot read 'at once'"):
        Scenario(["at once"])


def test_describe_draws_columns_and_says_why() -> None:
    rows = (decoding(3, {0: 2}), decoding(4, {1: 1}))
    view = draft(rows, [instance(0, free=14), instance(1, queued=1, prefilling=1), instance(2, alive=False)]).view
    plan = Plan(
        evicts=(PlannedEvict(9),),
        decodes=(PlannedDecode((0,), (PlannedDecodeRow(3, 0),)),),
        reservations=(Reservation(4, (0, 1), 5),),
    )
    assert describe(view, plan) == (
        "              0        1      (2)\n"
        "pages      2/16     0/16     0/16\n"
        "runs          -        P        -\n"
        "given  Dx1+hold     hold        .\n"
        "evict r9: an older one lacks a page\n"
        "D x1 on 0: r3; 1 by 0\n"
        "hold 0,1 for r4: it needs them together"
    )
