"""Every event and command survives its bytes, and equal values have equal bytes."""

from __future__ import annotations

import typing
from types import NoneType, UnionType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_jax import codec, types
from loong_jax.types import AnyCommand, AnyEvent

SMALL = {
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=16),
    bool: st.booleans(),
    NoneType: st.none(),
}


def values(kind: object) -> st.SearchStrategy:
    """Hypothesis strategy for a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in SMALL:
        return SMALL[kind]  # type: ignore[index]
    if origin is UnionType:
        return st.one_of(*map(values, args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(values(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if isinstance(kind, type) and issubclass(kind, types.StrEnum):
        return st.sampled_from(list(kind))
    assert isinstance(kind, type), kind
    assert issubclass(kind, msgspec.Struct), kind
    return records(kind)


def records(kind: type[msgspec.Struct]) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field: values(hints[field]) for field in kind.__struct_fields__})


@pytest.mark.parametrize("kind", typing.get_args(AnyEvent), ids=lambda kind: kind.__name__)
def test_events(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(records(kind))
    def round_trip(event: AnyEvent) -> None:
        data = codec.encode_event(event)
        assert codec.decode_event(data) == event
        assert codec.encode_event(codec.decode_event(data)) == data

    round_trip()


@pytest.mark.parametrize("kind", typing.get_args(AnyCommand), ids=lambda kind: kind.__name__)
def test_commands(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(records(kind))
    def round_trip(command: AnyCommand) -> None:
        data = codec.encode_command(command)
        assert codec.decode_command(data) == command
        assert codec.encode_command(codec.decode_command(data)) == data

    round_trip()


def test_equal_values_have_equal_bytes() -> None:
    forward = types.CostUpdated({"a": 1.0, "b": 2.0})
    backward = types.CostUpdated({"b": 2.0, "a": 1.0})
    assert codec.encode_event(forward) == codec.encode_event(backward)


def test_digest_sees_order_and_content() -> None:
    one, two = types.Truncate(1, 2), types.Truncate(2, 1)
    assert codec.digest([one, two]) == codec.digest(iter([one, two]))
    assert len({codec.digest(c) for c in ([], [one], [two], [one, two], [two, one])}) == 5


def test_an_event_is_no_command() -> None:
    with pytest.raises(msgspec.MsgspecError):
        codec.decode_command(codec.encode_event(types.Aborted(1)))
