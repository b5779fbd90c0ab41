"""Collectives of a compiled step: which, over which axis, how many bytes, and what runs while they are under way.

Loops whose trip count the compiler knows are multiplied out. Loops whose trip count is data of the step are kept apart
by what runs in them: `ring` loops hold permutes (a tile of context each trip), `query` loops hold gathers. What it is
not: how long they take.
"""

import re
from collections import Counter
from typing import NamedTuple

import msgspec

from loong_jax.aot.hlo import Module, Operation, arrays

KINDS = ("collective-permute", "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-broadcast")

_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")


class Collective(msgspec.Struct, frozen=True):
    """One collective of a program. `axis`: "sp", "tp", or "all"; `num_bytes`: of its result on one device; `times`: in
    one step, without loops whose trip count is data; `part`: "fixed", or the kind of such a loop that it stands in;
    `in_layer`: it runs once or more for each layer; `kernels`, `products`: Pallas kernels and matrix products between
    its start and its end, None where it is synchronous."""

    kind: str
    axis: str
    num_bytes: int
    times: int
    part: str
    in_layer: bool
    kernels: int | None
    products: int | None

    @property
    def form(self) -> str:
        """ "sync"; "async", with nothing of weight meanwhile; or "overlapped"."""
        if self.kernels is None:
            return "sync"
        return "overlapped" if self.kernels or self.products else "async"


class Traffic(NamedTuple):
    """(kind -> number) and (kind -> bytes of results on one device): always; each ring tile; each query tile."""

    fixed: tuple[Counter, Counter]
    ring_tile: tuple[Counter, Counter]
    query_tile: tuple[Counter, Counter]

    def total(self, ring_tiles: int, query_tiles: int) -> tuple[dict[str, int], dict[str, int]]:
        """Of one step, by its trip counts."""
        trips = (1, ring_tiles, query_tiles)
        return tuple(
            {kind: sum(n * part[what][kind] for n, part in zip(trips, self, strict=True)) for kind in KINDS}
            for what in (0, 1)
        )  # pyright: ignore[reportReturnType]


def traffic_of(hlo: str) -> Traffic:
    parts = {name: (Counter(), Counter()) for name in ("fixed", "ring", "query")}
    for found in collectives_of(Module(hlo), 1):
        parts[found.part][0][found.kind] += found.times
        parts[found.part][1][found.kind] += found.times * found.num_bytes
    return Traffic(parts["fixed"], parts["ring"], parts["query"])


def permute_overlaps(scheduled_hlo: str) -> tuple[list[int], int]:
    """How many kernels of a program run between start and end of each asynchronous permute, and how many permutes are
    synchronous. Raises ValueError for text that is not in the order of execution."""
    module = Module(scheduled_hlo)
    permutes = [meanwhile for found, meanwhile in _with_meanwhile(module) if _kind(module, found) == KINDS[0]]
    return [kernels for kernels, _ in filter(None, permutes)], permutes.count(None)


def collectives_of(module: Module, tp: int) -> list[Collective]:
    """All collectives of a step on a mesh (sp, tp) that send something. "in_layer" is right of stacked layers only,
    whose loop is the outermost one with a known trip count."""
    meanwhile = {id(op): found for op, found in _with_meanwhile(module)} if module.is_scheduled else {}
    out: list[Collective] = []

    def walk(name: str, times: int, part: str, in_layer: bool) -> None:
        for op in module.computations[name]:
            kind = _kind(module, op)
            if kind and not _is_alone(op.rest):
                kernels, products = meanwhile.get(id(op)) or (None, None)
                num_bytes = _result_bytes(op)
                axis = _axis(op.rest, tp)
                out.append(Collective(kind, axis, num_bytes, times, part, in_layer, kernels, products))
            if loop := module.loop(name, op):
                if loop.trips is not None:
                    walk(loop.body, times * loop.trips, part, True)
                elif kinds := {_kind(module, inner) for inner in module.within(loop.body)} - {None}:
                    assert part == "fixed", "a loop of unknown length in another"
                    walk(loop.body, times, "ring" if "collective-permute" in kinds else "query", in_layer)
            elif not kind:
                for called in op.called:
                    if called in module.computations:
                        walk(called, times, part, in_layer)

    walk(module.entry, 1, "fixed", False)
    return out


def _kind(module: Module, op: Operation) -> str | None:
    """The collective that an operation is, or starts."""
    opcode = op.opcode.removesuffix("-start")
    if opcode == "async":
        inner = [o.opcode for name in op.called for o in module.computations.get(name, ()) if o.opcode in KINDS]
        return inner[0] if inner else None
    return opcode if opcode in KINDS else None


def _with_meanwhile(module: Module) -> list[tuple[Operation, tuple[int, int] | None]]:
    """Each collective with (kernels, products) between its start and its end, None where it has no start."""
    if not module.is_scheduled:
        raise ValueError("the HLO is not scheduled: its lines say nothing of time")
    out: list[tuple[Operation, tuple[int, int] | None]] = []
    for operations in module.computations.values():
        under_way: dict[str, list] = {}
        for op in operations:
            if op.opcode.endswith("-start") and _kind(module, op):
                under_way[op.name] = [op, 0, 0]
            elif op.opcode.endswith("-done") and op.operands and op.operands[0] in under_way:
                started, kernels, products = under_way.pop(op.operands[0])
                out.append((started, (kernels, products)))
            elif op.opcode in KINDS:
                out.append((op, None))
            elif op.is_kernel or _multiplies(module, op):
                for entry in under_way.values():
                    entry[1 if op.is_kernel else 2] += 1
    return out


def _multiplies(module: Module, op: Operation) -> bool:
    if op.opcode == "fusion":
        return any(o.opcode in ("convolution", "dot") for name in op.called for o in module.within(name))
    return op.opcode in ("convolution", "dot")


def _result_bytes(op: Operation) -> int:
    """A start's shape is (operands, results, ...): its result is the second part."""
    found = arrays(op.shape)
    if op.opcode.endswith("-start") and len(found) > 1:
        return found[1].num_bytes
    return sum(array.num_bytes for array in found)


def _groups(rest: str) -> list[list[int]]:
    """Who takes part with whom, by number in the mesh; [] for all."""
    if listed := _GROUPS.search(rest):
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d, ]*)\}", listed[1])]
    if not (iota := _IOTA.search(rest)):
        return []
    count, size = (int(n) for n in iota[1].split(",")[:2])
    dims = [int(n) for n in iota[2].split(",")]
    axes = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(dims)))
    numbers = _transposed(dims, axes)
    return [numbers[first : first + size] for first in range(0, count * size, size)]


def _transposed(dims: list[int], axes: list[int]) -> list[int]:
    strides = [1] * len(dims)
    for axis in reversed(range(len(dims) - 1)):
        strides[axis] = strides[axis + 1] * dims[axis + 1]
    numbers = [0]
    for axis in axes:
        numbers = [n + i * strides[axis] for n in numbers for i in range(dims[axis])]
    return numbers


def _axis(rest: str, tp: int) -> str:
    if mesh := _MESH_GROUPS.search(rest):
        return mesh[2] if mesh[2] in ("sp", "tp") else "all"
    groups = _groups(rest)
    if groups and all(n % tp == group[0] % tp for group in groups for n in group):
        return "sp"
    return "tp" if groups and all(n // tp == group[0] // tp for group in groups for n in group) else "all"


def _is_alone(rest: str) -> bool:
    """Groups of one device (tp = 1) send nothing. Newer compilers name the axes of a mesh instead of the groups."""
    if mesh := _MESH_GROUPS.search(rest):
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        return all(sizes[axis.strip()] == "1" for axis in mesh[2].split(","))
    return max((len(group) for group in _groups(rest)), default=2) == 1
