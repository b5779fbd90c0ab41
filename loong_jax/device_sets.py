"""Which sets of instances the programs of the ladder are made for (DESIGN 5, Programs).

What it is: arithmetic over instance numbers. What it is not: which of them are READY (`manager.py`), or their making
(`programs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from loong_jax.types import Program

Instances = tuple[int, ...]


def device_sets(num_instances: int, dops: Iterable[int], platform: str) -> list[Instances]:
    """The sets of instances a program may run on, as sorted tuples, each DoP's together.

    CPU: arcs, wrapping around. TPU and GPU, where each new set costs a compile or a communicator: first, over all
    DoPs, the aligned blocks of a power of two, then the other arcs.
    """
    arcs = [arc for dop in dops for arc in _arcs(num_instances, dop)]
    if platform == "cpu":
        return arcs
    return sorted(arcs, key=lambda arc: not _is_aligned(arc))  # stable


def _arcs(num_instances: int, dop: int) -> list[Instances]:
    starts = range(1 if dop == num_instances else num_instances)
    return [tuple(sorted((start + rank) % num_instances for rank in range(dop))) for start in starts]


def _is_aligned(instances: Instances) -> bool:
    dop = len(instances)
    return dop & (dop - 1) == 0 and instances[0] % dop == 0 and instances[-1] - instances[0] == dop - 1


def on_sets(programs: Iterable[Program], sets: Iterable[Instances]) -> list[tuple[Program, Instances]]:
    """Every program with every set of its size."""
    sets = list(sets)
    return [(program, instances) for program in programs for instances in sets if len(instances) == program.dop]
