"""Compiled programs as text: computations, operations, loops and how often they run.

What it is: a reader of the HLO that `Compiled.as_text()` gives, of TPU, GPU and CPU. What it is not: what operations
mean (`collectives.py`, `work.py`).
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^| )([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(?:to_apply|calls|true_computation|false_computation|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"index=(\d+)")
KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[\w.]*|__gpu\$xla\.gpu\.triton)"')


class Array(NamedTuple):
    """One array of a shape. `in_hbm`: it lies in the main memory, not in VMEM, SMEM or a semaphore."""

    dims: tuple[int, ...]
    num_bytes: int
    in_hbm: bool


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape as HLO writes it; of a tuple, all of its parts."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(dim) for dim in dims.split(",") if dim)
        out.append(Array(sizes, _BYTES.get(dtype, 0) * math.prod(sizes), "S(" not in layout))
    return out


class Operation(NamedTuple):
    """One line. `shape`: of its result; `rest`: everything behind the opcode."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in arrays(self.shape))

    @property
    def is_kernel(self) -> bool:
        return self.opcode == "custom-call" and KERNEL.search(self.rest) is not None

    @property
    def called(self) -> list[str]:
        """Computations it calls, but those of a loop."""
        listed = [some or one for some, one in _CALLED.findall(self.rest)]
        return [name.strip().lstrip("%") for names in listed for name in names.split(",")]


class Loop(NamedTuple):
    """`trips`: None where data decides."""

    body: str
    trips: int | None


class Module:
    """A compiled program. `is_scheduled`: operations stand in the order in which they are executed."""

    def __init__(self, text: str | None):
        text = text or ""  # a backend may have none
        self.is_scheduled = "is_scheduled=true" in text
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        operations: list[Operation] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                operations = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif (found := _OPERATION.match(line)) and (operation := _operation(found[2], found[3])):
                operations.append(operation)

    @cached_property
    def by_name(self) -> dict[str, dict[str, Operation]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def loop(self, computation: str, operation: Operation) -> Loop | None:
        """What a while operation runs."""
        if operation.opcode != "while" or not (body := _BODY.search(operation.rest)):
            return None
        if known := _TRIPS.search(operation.rest):
            return Loop(body[1], int(known[1]))
        condition = _CONDITION.search(operation.rest)
        return Loop(body[1], self._bound(computation, operation, condition[1]) if condition else None)

    def within(self, computation: str) -> Iterator[Operation]:
        """All operations of a computation and of what it calls and loops over."""
        for operation in self.computations.get(computation, ()):
            yield operation
            bodies = _BODY.findall(operation.rest) if operation.opcode == "while" else []
            for name in [*operation.called, *bodies]:
                yield from self.within(name)

    def _bound(self, computation: str, loop: Operation, condition: str) -> int | None:
        """How often a loop that counts from 0 runs, if the condition compares with a constant."""
        names = self.by_name.get(condition, {})
        compare = next((op for op in names.values() if op.opcode == "compare" and "direction=LT" in op.rest), None)
        if compare is None or len(compare.operands) != 2:
            return None
        bound = names.get(compare.operands[1])
        if bound is not None and bound.opcode == "get-tuple-element" and (index := _INDEX.search(bound.rest)):
            carried = self.by_name[computation].get(loop.operands[0])
            if carried is not None and carried.opcode == "tuple":
                bound = self.by_name[computation].get(carried.operands[int(index[1])])
        number = re.match(r"(\d+)\)", bound.rest) if bound is not None and bound.opcode == "constant" else None
        return int(number[1]) if number else None


def _operation(name: str, definition: str) -> Operation | None:
    found = _OPCODE.search(definition)
    if found is None:
        return None
    rest = definition[found.end() :]
    inside = rest[: _closing(rest)]
    return Operation(name, found[1], definition[: found.start()], tuple(_NAME.findall(inside)), rest)


def _closing(text: str) -> int:
    """Where the parenthesis ends that is open at the start."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return at
    return len(text)
