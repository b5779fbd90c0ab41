"""Simulation testing finds mistakes: each of those made by hand, within a minute of CPU time."""

import pytest

from loong_jax.ledger import Ledger
from tests.support.mutants import LAST_FOUND_BY, MUTANTS, Mutant, hunt, mutated

BUDGET_S = 60.0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_found(mutant: Mutant) -> None:
    found = hunt(mutant, BUDGET_S, LAST_FOUND_BY.get(mutant.name, 0))
    assert found is not None
    assert found.cpu_s < BUDGET_S


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_found_by_who_knows_nothing_of_it(mutant: Mutant) -> None:
    assert hunt(mutant, BUDGET_S) is not None


def test_there_are_enough_and_they_differ() -> None:
    assert len(MUTANTS) >= 25
    assert len({(m.target, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert set(LAST_FOUND_BY) <= {m.name for m in MUTANTS}


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
