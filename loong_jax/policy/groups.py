"""Which groups may be formed now: the READY programs, indexed by the instances they run on.

Sets of instances are bit masks here: a plan makes thousands of subset tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from loong_jax.config import ClusterConfig
from loong_jax.types import Phase, PlannedPrepare, Program


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
        self._exact = {(phase, group.mask): group for phase, groups in self._groups.items() for group in groups}
        self._ready = ready
        self._smallest: dict[tuple[Phase, int, int], Group | None] = {}
        self._wanted: dict[tuple[Phase, int, int, int, int], PlannedPrepare | None] = {}

    def exactly(self, phase: Phase, mask: int) -> Group | None:
        return self._exact.get((phase, mask))

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

    def wanted(
        self, phase: Phase, need: int, alive: int, bucket: int, cluster: ClusterConfig, least_dop: int = 1
    ) -> PlannedPrepare | None:
        """The program that would serve `need` best, if it is not READY: on the smallest arc of neighbours that covers
        it, or, where lost instances break every arc, on the smallest set; of `least_dop` instances or more."""
        key = (phase, need, alive, bucket, least_dop)
        if key not in self._wanted:
            self._wanted[key] = self._find_wanted(phase, need, alive, bucket, cluster, least_dop)
        return self._wanted[key]

    def _find_wanted(
        self, phase: Phase, need: int, alive: int, bucket: int, cluster: ClusterConfig, least_dop: int
    ) -> PlannedPrepare | None:
        least_dop = max(least_dop, need.bit_count())
        dops = [dop for dop in cluster.ladder.dops if least_dop <= dop <= alive.bit_count()]
        n = cluster.num_instances
        arcs = (mask_of((first + k) % n for k in range(dop)) for dop in dops for first in range(n))
        instances = next((members(arc) for arc in arcs if need & ~arc == 0 and arc & ~alive == 0), None)
        if instances is None:
            if not dops:
                return None
            others = members(alive & ~need)
            instances = tuple(sorted(members(need) + others[: dops[0] - need.bit_count()]))
        program = Program(phase, len(instances), bucket)
        return None if (program, instances) in self._ready else PlannedPrepare(program, instances)
