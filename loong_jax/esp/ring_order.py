"""The order in which instances take the devices of a TPU slice, so that the ring of a group runs over neighbours.

An instance is a tile of neighbouring devices, and instances are numbered along a closed cycle through all tiles: each
is a neighbour of the next, and the last of the first. Then a group of consecutive instances is a connected piece of the
slice, and the ring of all of them has only hops of one tile. On v5e slices of more than 16 chips XLA makes permutes
synchronous in any other order (`docs/sizing.md`). The tiles of one host come one after the other.

What it is not: which groups are formed (`loong_jax/device_sets.py`, `policy/`). On other platforms, and where TPUs form
no box, devices are taken in the order of process and number.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from loong_jax.retarget import Device

Cell = tuple[int, ...]
"""A place in a grid, or the sizes of one."""


def in_ring_order(devices: Sequence[Device], tp: int) -> list[tuple[Device, ...]]:
    """The devices of each instance of `tp`, as many as there are; devices left over are left out."""
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    if ordered and all(device.platform == "tpu" for device in ordered):
        lowest = [min(axis) for axis in zip(*map(_place, ordered), strict=True)]
        cells = {tuple(p - low for p, low in zip(_place(d), lowest, strict=True)): d for d in ordered}
        size = tuple(max(axis) + 1 for axis in zip(*cells, strict=True))
        if len(cells) == math.prod(size) and (instances := _tiled(cells, size, tp)):
            return instances
    return [tuple(ordered[first : first + tp]) for first in range(0, len(ordered) - tp + 1, tp)]


def closed_cycle(size: Cell) -> list[Cell]:
    """All cells of a grid, each a neighbour of the next and, where the grid allows it, the last of the first."""
    evens = [axis for axis, length in enumerate(size) if length % 2 == 0]
    across = [axis for axis, length in enumerate(size) if length > 1]
    if not evens or len(across) < 2:
        return list(_snake(size))
    axis = evens[0]
    rest = list(_snake(tuple(1 if a == axis else length for a, length in enumerate(size))))
    place = lambda along, cell: (*cell[:axis], along, *cell[axis + 1 :])
    # up one column, and back through the rest of each row, to and fro
    cycle = [place(along, rest[0]) for along in range(size[axis])]
    for turn, along in enumerate(reversed(range(size[axis]))):
        row = rest[1:] if turn % 2 == 0 else rest[:0:-1]
        cycle += [place(along, cell) for cell in row]
    return cycle


def _snake(size: Cell) -> Iterator[Cell]:
    """All cells of a grid, each a neighbour of the next."""
    if not size:
        yield ()
        return
    for index, inner in enumerate(itertools.tee(_snake(size[1:]), size[0])):
        cells = list(inner)
        for cell in cells if index % 2 == 0 else reversed(cells):
            yield (index, *cell)


def _place(device: Device) -> Cell:
    """Core first: the cores of a chip are the nearest neighbours of all."""
    return (device.core_on_chip, *device.coords)


def _tiled(cells: dict[Cell, Device], size: Cell, tp: int) -> list[tuple[Device, ...]]:
    """Instances along the best cycle there is; [] where `tp` is no box of the slice."""
    host = _host_box(cells, size)
    found = [
        tile
        for tile in itertools.product(*(_divisors(length) for length in size))
        if math.prod(tile) == tp and (_divides(tile, host) or tp > math.prod(host))
    ]
    best: tuple[tuple[bool, int, Cell], list[Cell], Cell] | None = None
    for tile in found:
        grid = tuple(length // t for length, t in zip(size, tile, strict=True))
        hosts = tuple(max(1, h // t) for h, t in zip(host, tile, strict=True))
        order = _by_hosts(grid, hosts)
        # a closed cycle if there is one, and then the tile with the nearest corners, both cores of a chip first
        rank = (not _is_closed(order), sum(tile), tuple(-t for t in tile))
        if best is None or rank < best[0]:
            best = rank, order, tile
    if best is None:
        return []
    _, order, tile = best
    inside = list(_snake(tile))
    return [
        tuple(cells[tuple(p * t + i for p, t, i in zip(place, tile, inner, strict=True))] for inner in inside)
        for place in order
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _divides(tile: Cell, box: Cell) -> bool:
    return all(b % t == 0 for t, b in zip(tile, box, strict=True))


def _host_box(cells: dict[Cell, Device], size: Cell) -> Cell:
    """Sizes of the boxes that hosts hold; the whole slice where they hold none."""
    first = next(iter(cells.values())).process_index
    mine = [cell for cell, device in cells.items() if device.process_index == first]
    box = tuple(max(axis) - min(axis) + 1 for axis in zip(*mine, strict=True))
    by_box: dict[Cell, set[int]] = {}
    for cell, device in cells.items():
        by_box.setdefault(tuple(c // b for c, b in zip(cell, box, strict=True)), set()).add(device.process_index)
    return box if _divides(box, size) and all(len(owners) == 1 for owners in by_box.values()) else size


def _is_closed(order: Sequence[Cell]) -> bool:
    return len(order) <= 2 or _are_neighbours(order[0], order[-1])


def _are_neighbours(a: Cell, b: Cell) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1


def _by_hosts(grid: Cell, host: Cell) -> list[Cell]:
    """A cycle through the grid that goes through each box of `host` cells in one piece, if there is one; otherwise the
    boxes in the order of their cycle, each by itself."""
    boxes = closed_cycle(tuple(g // h for g, h in zip(grid, host, strict=True)))
    if len(boxes) == 1 or math.prod(host) == 1:
        return closed_cycle(grid)
    corner = lambda box: tuple(b * h for b, h in zip(box, host, strict=True))
    inside = list(itertools.product(*map(range, host)))
    paths = {(path[0], path[-1]): path for start in inside for path in _paths(host, [start])}
    steps = [tuple(b - a for a, b in zip(box, after, strict=True)) for box, after in itertools.pairwise(boxes)]
    back = tuple(b - a for a, b in zip(boxes[-1], boxes[0], strict=True))
    for entry in inside:
        if (chosen := _chain(entry, [*steps, back], paths, host, entry)) is not None:
            return [
                tuple(c + i for c, i in zip(corner(box), cell, strict=True))
                for box, path in zip(boxes, chosen, strict=True)
                for cell in path
            ]
    return [
        tuple(c + i for c, i in zip(corner(box), cell, strict=True)) for box in boxes for cell in closed_cycle(host)
    ]


def _chain(
    entry: Cell, steps: list[Cell], paths: dict[tuple[Cell, Cell], list[Cell]], host: Cell, goal: Cell
) -> list[list[Cell]] | None:
    """Paths through the boxes, one after the other: the end of each is a neighbour of the start of the next, which
    lies in the direction of the step; the last ends beside `goal`. By entry cells reached, so linear in the boxes."""
    reached: dict[Cell, list[list[Cell]]] = {entry: []}
    for step in steps:
        following: dict[Cell, list[list[Cell]]] = {}
        for start, before in reached.items():
            for (first, last), path in paths.items():
                after = tuple(c + s - h * s for c, s, h in zip(last, step, host, strict=True))
                if first == start and all(0 <= a < h for a, h in zip(after, host, strict=True)):
                    following.setdefault(after, [*before, path])
        reached = following
    return reached.get(goal)


def _paths(size: Cell, path: list[Cell]) -> Iterator[list[Cell]]:
    """All paths through a small box that go on from `path`."""
    if len(path) == math.prod(size):
        yield path
        return
    for axis, length in enumerate(size):
        for step in (-1, 1):
            cell = (*path[-1][:axis], path[-1][axis] + step, *path[-1][axis + 1 :])
            if 0 <= cell[axis] < length and cell not in path:
                yield from _paths(size, [*path, cell])
