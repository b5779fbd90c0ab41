"""The vocabulary: frozen, without references, told apart by tags."""

import typing

import msgspec
import pytest

from loong_jax import types
from loong_jax.types import AnyCommand, AnyEvent, Phase, Program, Run, Sampling

RECORDS = [v for v in vars(types).values() if isinstance(v, type) and issubclass(v, msgspec.Struct)]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_are_frozen_and_have_no_reference(kind: type[msgspec.Struct]):
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.array_like, "the log is half as long without names"
    for hint in typing.get_type_hints(kind).values():
        assert "object" not in str(hint), hint
        assert "Callable" not in str(hint), hint


@pytest.mark.parametrize("union", [AnyEvent, AnyCommand])
def test_each_has_a_tag_of_its_own(union):
    members = typing.get_args(union)
    tags = [kind.__struct_config__.tag for kind in members]
    assert len(set(tags)) == len(tags)
    base = types.Event if union is AnyEvent else types.Command
    assert set(members) == set(base.__subclasses__()), "every one is in the union, or it could not be decoded"


def test_runs_and_programs_are_ordered_keys():
    assert Run(3, 4).end == 7
    assert sorted([Run(3, 1), Run(0, 5)])[0] == Run(0, 5)
    program = Program(Phase.DECODE, 2, 8)
    assert {program: 1}[Program(Phase.DECODE, 2, 8)] == 1
    assert Sampling().temperature == 0, "greedy unless told otherwise"
