"""What may come over the wire: every field of every request message, and values at and past the ends of its type; and
how many of them come at a time.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from serving.proto.loong.v1 import loong_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["Loong"].methods
Path = tuple[FieldDescriptor, ...]

_INT32 = (0, 1, -1, 2**31 - 1, -(2**31))
_INT64 = (*_INT32, 2**31, 2**63 - 1, -(2**63))
_FLOAT = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 3e38, 1e-45)
_STRING = ("", "a", "\x00", "é𝄞\u202e\ufeff", "{{ x }}", "a" * 5000)
VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_INT32: _INT32,
    FieldDescriptor.CPPTYPE_INT64: _INT64,
    FieldDescriptor.CPPTYPE_FLOAT: _FLOAT,
    FieldDescriptor.CPPTYPE_DOUBLE: (*_FLOAT, 1e308, 5e-324),
    FieldDescriptor.CPPTYPE_STRING: _STRING,
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
}
NUMBERS = frozenset(VALUES) - {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_BOOL}


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def leaves(descriptor: Descriptor, above: Path = ()) -> Iterator[Path]:
    """The fields that hold values, each by the way to it. Of a map: its values, then its keys."""
    for field in descriptor.fields:
        path = (*above, field)
        if is_map(field):
            yield (*path, field.message_type.fields_by_name["value"])
            yield (*path, field.message_type.fields_by_name["key"])
        elif field.message_type is not None:
            yield from leaves(field.message_type, path)
        else:
            yield path


def name_of(path: Path) -> str:
    """As the server names it: "sampling.top_p", "messages.messages.role"."""
    return ".".join(field.name for field in path)


def put(message: Message, path: Path, value: Any, times: int = 1) -> None:
    """Set a leaf; of repeated ones, add it so many times. Raises ValueError where the type cannot hold it."""
    node: Any = message
    for place, field in enumerate(path[:-1]):
        if is_map(field):
            entries = getattr(node, field.name)
            if path[place + 1].name == "key":
                entries[value] = 1.0
            else:
                entries[5] = value
            return
        node = getattr(node, field.name).add() if field.is_repeated else getattr(node, field.name)
    if path[-1].is_repeated:
        getattr(node, path[-1].name).extend([value] * times)
    else:
        setattr(node, path[-1].name, value)


def changed(base: Message, path: Path, value: Any, times: int = 1) -> Message:
    """A copy of `base` with that leaf, and with nothing else in what holds it where that is the other side of a
    oneof, or repeated."""
    message = type(base)()
    message.CopyFrom(base)
    if path[-1].is_repeated and len(path) == 1:
        message.ClearField(path[0].name)
    put(message, path, value, times)
    return message


AT_ONCE = 16
"""Cases under way together: a server that waits for one does nothing else. Each is followed by its own probe."""


async def each(one: Callable[..., Awaitable[object]], cases: Iterable[tuple[Any, ...]]) -> None:
    """`one(*case)` for all of them, a few at a time. The first error ends it, and is raised."""
    left = iter(cases)

    async def work() -> None:
        for case in left:
            await one(*case)

    tasks = [asyncio.create_task(work()) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
