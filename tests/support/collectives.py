"""Collectives of a compiled step, read from its HLO text: how many, and how many bytes a device sends into them.

Loops whose trip count the compiler knows are multiplied out. Loops whose trip count is data of the step are kept apart
by what runs in them: `ring` loops hold permutes (a tile of context each trip), `query` loops hold gathers.
"""

import re
from collections import Counter
from typing import NamedTuple

KINDS = ("collective-permute", "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-broadcast")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<=)")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|true_computation|false_computation|branch_computations)=\{?%?([\w.\-]+(?:, %?[\w.\-]+)*)"
)
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def permute_overlaps(scheduled_hlo: str) -> tuple[list[int], int]:
    """How many kernels of a program for TPU run between start and end of each asynchronous permute, and how many
    permutes are synchronous. Raises ValueError for text that is not in the order of execution."""
    if "is_scheduled=true" not in scheduled_hlo:
        raise ValueError("the HLO is not scheduled: its lines say nothing of time")
    kernels, under_way = [], {}
    for line in scheduled_hlo.splitlines():
        if started := re.search(r"%([\w.\-]+) = .* collective-permute-start\(", line):
            under_way[started[1]] = 0
        elif ended := re.search(r" collective-permute-done\(.*?%([\w.\-]+)\)", line):
            kernels.append(under_way.pop(ended[1]))
        elif 'custom_call_target="tpu_custom_call"' in line:
            under_way = {name: count + 1 for name, count in under_way.items()}
    return kernels, len(re.findall(r" collective-permute\(", scheduled_hlo))


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
        )  # fmt: skip


def traffic_of(hlo: str) -> Traffic:
    computations, entry = _computations(hlo)
    parts = {name: (Counter(), Counter()) for name in ("fixed", "ring", "query")}

    def walk(name: str, times: int, part: str) -> None:
        for line in computations[name]:
            found = _COLLECTIVE.search(line)
            if found and not _is_alone(line):
                parts[part][0][found[2]] += times
                parts[part][1][found[2]] += times * _result_bytes(found[1])
            if body := _BODY.search(line):
                known = _TRIPS.search(line)
                if known:
                    walk(body[1], times * int(known[1]), part)
                elif kinds := _kinds_within(computations, body[1]):
                    assert part == "fixed", "a loop of unknown length in another"
                    walk(body[1], times, "ring" if "collective-permute" in kinds else "query")
            for called in _CALLED.findall(line):
                for callee in called.replace("%", "").split(", "):
                    if callee in computations:
                        walk(callee, times, part)

    walk(entry, 1, "fixed")
    return Traffic(parts["fixed"], parts["ring"], parts["query"])


def _is_alone(line: str) -> bool:
    """Groups of one device (tp = 1) send nothing. Newer compilers name the axes of a mesh instead of the groups."""
    mesh = _MESH_GROUPS.search(line)
    if mesh is None:
        return _ALONE.search(line) is not None
    sizes = dict(axis.split("=") for axis in mesh[1].split(","))
    return all(sizes[axis.strip()] == "1" for axis in mesh[2].split(","))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    out: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = out[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return out, entry


def _kinds_within(computations: dict[str, list[str]], name: str) -> set[str]:
    kinds: set[str] = set()
    for line in computations[name]:
        kinds |= {found[2] for found in [_COLLECTIVE.search(line)] if found}
        for called in [*_CALLED.findall(line), *_BODY.findall(line)]:
            for callee in called.replace("%", "").split(", "):
                kinds |= _kinds_within(computations, callee) if callee in computations else set()
    return kinds


def _result_bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        size = _BYTES[dtype]
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total
