"""Which groups may be formed now: the READY programs, indexed by the instances they run on.

Sets of instances are bit masks here: a plan makes thousands of subset tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from loong_jax.types import Phase, Program


class Group(NamedTuple):
    """Instances with a READY program; `bucket` is the largest one READY there."""

    dop: int
    instances: tuple[int, ...]
    mask: int
    bucket: int


def mask_of(instances: Iterable[int]) -> int:
    mask = 0
    for instance in instances:
        mask |= 1 << instance
    return mask


def members(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


class ReadyGroups:
    """Groups by phase, smallest first. Built once per set of READY programs."""

    def __init__(self, ready: frozenset[tuple[Program, tuple[int, ...]]]) -> None:
        largest: dict[tuple[Phase, tuple[int, ...]], int] = {}
        for program, instances in ready:
            key = (program.phase, instances)
            largest[key] = max(program.bucket, largest.get(key, 0))
        self._groups: dict[Phase, list[Group]] = {phase: [] for phase in Phase}
        for (phase, instances), bucket in largest.items():
            self._groups[phase].append(Group(len(instances), instances, mask_of(instances), bucket))
        for groups in self._groups.values():
            groups.sort()
        self._smallest: dict[tuple[Phase, int, int], Group | None] = {}

    def covering(self, phase: Phase, need: int, allowed: int) -> Iterable[Group]:
        """Groups that hold all of `need` and nothing outside `allowed`, smallest first."""
        for group in self._groups[phase]:
            if group.mask & need == need and group.mask & ~allowed == 0:
                yield group

    def smallest(self, phase: Phase, need: int, allowed: int) -> Group | None:
        key = (phase, need, allowed)
        if key not in self._smallest:
            self._smallest[key] = next(iter(self.covering(phase, need, allowed)), None)
        return self._smallest[key]

    def reach(self, phase: Phase, need: int, allowed: int) -> int:
        """All instances that share a group with all of `need`."""
        mask = 0
        for group in self.covering(phase, need, allowed):
            mask |= group.mask
        return mask
