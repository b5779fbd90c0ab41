"""Arcs, alignment, and pairing of programs with sets."""

from loong_jax.device_sets import device_sets, on_sets
from loong_jax.types import Phase, Program


def test_cpu_sets_are_all_arcs_and_wrap_around():
    sets = device_sets(4, (1, 3, 4), "cpu")
    assert sets == [(0,), (1,), (2,), (3,), (0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2, 3)]


def test_aligned_powers_of_two_come_first_on_accelerators():
    sets = device_sets(4, (2, 3), "tpu")
    assert sets[:2] == [(0, 1), (2, 3)]
    assert sorted(sets) == sorted(device_sets(4, (2, 3), "cpu"))


def test_a_program_meets_the_sets_of_its_size_only():
    decode = Program(Phase.DECODE, 2, 8)
    assert on_sets([decode], device_sets(3, (1, 2), "cpu")) == [(decode, (0, 1)), (decode, (1, 2)), (decode, (0, 2))]
