"""Where new KV is kept: even shares on the way, the fewest instances at a prompt's end (LoongServe section 5.4).

What it is: arithmetic over free pages; it changes the caller's `free` as it hands pages out.
What it is not: a choice of the group, or a migration: what moves here moves while it circulates anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loong_jax.types import Rehome, RequestView, Share


class Placement(NamedTuple):
    keep: tuple[Share, ...]
    rehome: tuple[Rehome, ...] = ()


def even(view: RequestView, num_units: int, instances: Sequence[int], free: dict[int, int]) -> Placement:
    """Level the pages of the request over `instances`, as far as free pages allow (they suffice in sum)."""
    held = {resident.instance: resident.pages for resident in view.resident}
    bottom = {i: held.get(i, 0) for i in instances if free[i] > 0}
    low, high = min(bottom.values(), default=0), max(bottom.values(), default=0) + num_units
    while low < high:  # the highest level that the units suffice for
        level = (low + high + 1) // 2
        if sum([min(free[i], max(0, level - pages)) for i, pages in bottom.items()]) <= num_units:
            low = level
        else:
            high = level - 1
    taken = {i: min(free[i], max(0, low - pages)) for i, pages in bottom.items()}
    left = num_units - sum(taken.values())
    for instance in sorted(bottom):  # and one more each, as far as they go
        if left and taken[instance] < free[instance] and bottom[instance] + taken[instance] == low:
            taken[instance] += 1
            left -= 1
    for instance, pages in taken.items():
        free[instance] -= pages
    return Placement(tuple([Share(i, pages) for i, pages in taken.items() if pages]))


def packed(
    view: RequestView,
    num_units: int,
    instances: Sequence[int],
    free: dict[int, int],
    headroom: int,
    load: Sequence[int],
    most: dict[int, int] | None = None,
) -> Placement:
    """Keep the request on the fewest of `instances` that hold it all with `headroom` free pages; its pages elsewhere
    move there. `load`: decode rows by instance, to spread requests that fit on one. `most`: pages of it that each may
    hold, where memory allows that. Falls back to even shares."""
    held = {resident.instance: resident.pages for resident in view.resident}
    need = sum(held.values()) + num_units + headroom
    room = {i: free[i] + held.get(i, 0) for i in instances}
    limits = [room] if most is None else [{i: min(room[i], most[i]) for i in instances}, room]
    for room in limits:
        target = _fewest(held, need, instances, room, load)
        if target is not None:
            break
    else:
        return even(view, num_units, instances, free)
    spare = {i: max(0, room[i] - held.get(i, 0)) for i in target}
    rehome: list[Rehome] = []
    for src in sorted(set(held) - set(target)):
        left = held[src]
        for dst in target:
            pages = min(left, spare[dst])
            if pages:
                rehome.append(Rehome(view.request, src, dst, pages))
                spare[dst] -= pages
                free[dst] -= pages
                left -= pages
    return Placement(_fill(num_units, target, free, spare), tuple(rehome))


def _fewest(
    held: dict[int, int], need: int, instances: Sequence[int], room: dict[int, int], load: Sequence[int]
) -> list[int] | None:
    single = [i for i in instances if room[i] >= need]
    if single:
        return [min(single, key=lambda i: (-held.get(i, 0), load[i], -room[i], i))]
    by_room = sorted(instances, key=lambda i: (-room[i], i))
    total = 0
    for count, instance in enumerate(by_room, start=1):
        total += room[instance]
        if total >= need:
            return sorted(by_room[:count])
    return None


def _fill(num_units: int, target: Sequence[int], free: dict[int, int], spare: dict[int, int]) -> tuple[Share, ...]:
    """Shares in order of `target`, as even as the pages to spare allow."""
    keep: list[Share] = []
    left = num_units
    by_spare = sorted(target, key=lambda i: (spare[i], i))
    for index, instance in enumerate(by_spare):
        pages = min(spare[instance], -(-left // (len(by_spare) - index)))
        if pages:
            keep.append(Share(instance, pages))
            free[instance] -= pages
            left -= pages
    return tuple(keep)
