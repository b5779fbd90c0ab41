"""The cycle through the tiles of a slice: closed, hosts in one piece, nothing left out. That XLA then makes permutes
asynchronous: `tests/loong_jax/aot/test_overlap.py`."""

import itertools
import math
from types import SimpleNamespace

import pytest

from loong_jax.esp.ring_order import closed_cycle, in_ring_order


def slice_of(size: tuple[int, int, int], cores: int = 1, host: tuple[int, int, int] = (2, 2, 1), origin: int = 0):
    """A slice's devices as JAX lists them: host by host, along x first."""
    box = lambda place: tuple(p // h for p, h in zip(place, host, strict=True))[::-1]
    places = [place[::-1] for place in itertools.product(*(range(length) for length in size[::-1]))]
    hosts = {key: index for index, key in enumerate(sorted({box(place) for place in places}))}
    return [
        SimpleNamespace(
            platform="tpu",
            id=number,
            process_index=hosts[box(place)],
            coords=[p + origin for p in place],
            core_on_chip=core,
        )
        for number, (place, core) in enumerate(itertools.product(sorted(places, key=box), range(cores)))
    ]


def place(device) -> tuple[int, ...]:
    return (device.core_on_chip, *device.coords)


def are_next(one, other) -> bool:
    """Whether some link joins two instances."""
    return any(math.dist(place(a), place(b)) == 1 for a in one for b in other)


SLICES = {
    "v5e:2x4": slice_of((2, 4, 1)),
    "v5e:2x4 on one host": slice_of((2, 4, 1), host=(2, 4, 1)),
    "v5e:4x4": slice_of((4, 4, 1)),
    "v5e:4x8": slice_of((4, 8, 1)),
    "v5e:8x8": slice_of((8, 8, 1), origin=8),
    "v5e:16x16": slice_of((16, 16, 1)),
    "v5p:2x2x2": slice_of((2, 2, 2)),
    "v5p:4x4x4": slice_of((4, 4, 4)),
    "tpu7x:2x2x1": slice_of((2, 2, 1), cores=2),
    "tpu7x:2x2x2": slice_of((2, 2, 2), cores=2),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SLICES)
def test_rings_are_closed_and_hosts_in_one_piece(name: str, tp: int):
    devices = SLICES[name]
    instances = in_ring_order(devices[::-1], tp)
    assert sorted(d.id for members in instances for d in members) == list(range(len(devices)))
    assert {len(members) for members in instances} == {tp}
    around = itertools.pairwise([*instances, instances[0]])
    assert len(instances) == 1 or all(are_next(one, other) for one, other in around)
    assert all(math.dist(place(a), place(b)) == 1 for members in instances for a, b in itertools.pairwise(members))
    hosts = [members[0].process_index for members in instances]
    if all(len({d.process_index for d in members}) == 1 for members in instances):
        assert len(list(itertools.groupby(hosts))) == len(set(hosts))


@pytest.mark.parametrize("size", [(3, 3), (1, 5), (5,), (2,), (1, 1), (3, 5, 3)])
def test_grids_without_a_closed_cycle_have_a_path(size):
    cells = closed_cycle(size)
    assert len(set(cells)) == math.prod(size)
    assert all(math.dist(a, b) == 1 for a, b in itertools.pairwise(cells))


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (3, 4, 5), (2, 2, 2, 2), (1, 6, 3)])
def test_grids_with_an_even_side_have_a_closed_cycle(size):
    cells = closed_cycle(size)
    assert len(set(cells)) == math.prod(size)
    assert all(math.dist(a, b) == 1 for a, b in itertools.pairwise([*cells, cells[0]]))


def test_other_devices_keep_their_order():
    plain = [SimpleNamespace(platform="cpu", id=i, process_index=1 - i // 4) for i in range(8)]
    assert [[d.id for d in members] for members in in_ring_order(plain, 3)] == [[4, 5, 6], [7, 0, 1]]
    ragged = SLICES["v5e:2x4"][:7]  # no box
    assert [[d.id for d in members] for members in in_ring_order(ragged, 2)] == [[0, 1], [2, 3], [4, 5]]
    three = in_ring_order(SLICES["v5e:2x4"], 3)  # no box of three in 2 x 4
    assert [[d.id for d in members] for members in three] == [[0, 1, 2], [3, 4, 5]]
