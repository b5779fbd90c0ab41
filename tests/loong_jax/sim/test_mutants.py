"""Simulation testing finds mistakes: each of those made by hand, within a minute of CPU time."""

import pytest

from loong_jax.ledger import Ledger
from tests.support.mutants import MUTANTS, Mutant, hunt, mutated

BUDGET_S = 60.0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_found(mutant: Mutant) -> None:
    found = hunt(mutant, BUDGET_S)
    assert found is not None
    assert found.cpu_s < BUDGET_S


def test_there_are_enough_and_they_differ() -> None:
    assert len(MUTANTS) >= 25
    assert len({(m.target, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_a_mutant_is_gone_afterwards() -> None:
    before = Ledger._release
    with mutated(MUTANTS[0]):
        assert Ledger._release is not before
    assert Ledger._release is before


def test_a_mutant_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds 'nothing like it' 0 times"), mutated(
        Mutant("old", "ledger:Ledger._release", "nothing like it", "")
    ):  # fmt: skip
        pass
