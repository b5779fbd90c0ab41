"""The executor beyond single steps: tables on the devices, steps that fail, the end. Steps themselves: tests of esp."""

import threading

import pytest

from loong_jax.programs import Programs
from loong_jax.types import (
    Phase,
    Prepare,
    Program,
    ProgramReady,
    Reset,
    Run,
    Sampling,
    StepFailed,
)
from tests.support.plane import CLUSTER, Plane, data_plane, steady_plane
from tests.support.real_engine import stored_programs


class FailingPrograms:
    """The shared programs; the next call fails as told: "dispatch" raises after the pools were donated, "device" gives
    an output that cannot be read, as an asynchronous failure does."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self.mode: str | None = None

    def get(self, program: Program, instances: tuple[int, ...]):
        compiled = self._programs.get(program, instances) or self._programs.compile(program, instances)
        mode, self.mode = self.mode, None

        def call(*arguments):
            state, sampled = compiled(*arguments)
            if mode == "dispatch":
                raise RuntimeError("out of everything")
            if mode == "device":
                sampled.delete()
            return state, sampled

        return call


@pytest.fixture
def plane():
    with steady_plane() as plane:
        yield plane


@pytest.fixture
def failing():
    data = data_plane()
    plane = Plane(data, programs=FailingPrograms(data.programs))
    yield plane
    plane.close()


def fail(plane: Plane, mode: str) -> None:
    plane.executor._programs.mode = mode


def expect_failure(plane: Plane, command) -> StepFailed:
    plane.executor.submit(command)
    event = plane.events.get(timeout=120)
    assert isinstance(event, StepFailed), event
    assert event.step == command.step
    return event


@pytest.mark.parametrize("mode", ["dispatch", "device"])
def test_a_failed_step_ends_in_an_event_and_a_reset_mends_it(failing: Plane, mode):
    """Its instances are named; after Reset they serve again; a group that had nothing to do with it goes on."""
    a, b = failing.sequence(50), failing.sequence(40)
    failing.prefill((0, 1), [(a, 50)], [0, 1])
    failing.prefill((2, 3), [(b, 40)], [2, 3])
    fail(failing, mode)
    event = expect_failure(failing, failing.decode_command((0, 1), [(a, 0)]))
    assert event.instances == (0, 1)
    assert ("out of everything" if mode == "dispatch" else "deleted") in event.reason
    failing.decode((2, 3), [(b, 3)])
    failing.free(a)
    failing.executor.submit(Reset((0, 1)))
    a.issued = len(a.tokens)
    failing.prefill((0, 1), [(a, 51)], [1, 0])
    failing.decode((0, 1, 2, 3), [(a, 3), (b, 0)])
    failing.check(a, b)


def test_steps_behind_a_failed_one_fail_by_events(failing: Plane):
    """Until the Reset every step that needs a lost pool is refused, and no other pool goes with it: not that of a
    group whose member stands beside a lost one, nor where a whole page table has to be sent."""
    a, b = failing.sequence(50), failing.sequence(40)
    failing.prefill((0, 1), [(a, 50)], [0, 1])
    failing.prefill((2, 3), [(b, 40)], [3])
    long = failing.sequence(64 * 12)
    for _ in range(12):  # so many pages that a fork is more than deltas can tell
        failing.prefill((1,), [(long, 64)], [1])
    failing.decode((0, 1), [(a, 1)])
    fail(failing, "dispatch")
    expect_failure(failing, failing.decode_command((0, 1), [(a, 0)]))
    failing.fork(long, Sampling())
    event = expect_failure(failing, failing.decode_command((1, 2), [(long, 2)]))
    assert event.instances == (1, 2)
    assert "StateLost" in event.reason
    expect_failure(failing, failing.decode_command((0, 1), [(a, 0)], on_device=True))
    failing.decode((2, 3), [(b, 3)])
    failing.check(b)


def test_nothing_is_left_of_a_lost_pool(failing: Plane):
    """The tables are empty after a Reset: pages in use before do not show in what comes after."""
    a = failing.sequence(50)
    failing.prefill((0, 1), [(a, 50)], [0, 1])
    fail(failing, "device")
    expect_failure(failing, failing.decode_command((0, 1), [(a, 0)]))
    failing.free(a)
    failing.executor.submit(Reset((0, 1)))
    assert not any(table.any() for i in (0, 1) for table in failing.tables()[i])
    assert not any(pool.any() for i in (0, 1) for pool in failing.pools()[i])
    assert failing.tables()[2][0].shape == (CLUSTER.table_entries, 3)


def held(plane: Plane, sequence, table, instance: int) -> dict[int, Run]:
    start, length = plane.executor._tables.tables[instance].range(sequence.request)
    return {int(page): Run(int(first), int(count)) for page, first, count in table[start : start + length]}


def test_devices_hear_of_every_change(plane: Plane):
    """Forks, holes, truncation and frees, some too large for deltas: what the devices hold is what the script did."""
    group, long = (0, 1), plane.sequence(16 * 56)
    for _ in range(7):
        plane.prefill(group, [(long, 128)], [0])
    children = [plane.fork(long, Sampling(seed=seed)) for seed in range(2)]  # 56 entries each, 40 deltas a step
    other = plane.sequence(70)
    plane.prefill(group, [(other, 70)], [1, 0])
    plane.free(children[0])
    plane.truncate(long, 16 * 50 + 4)
    rows = [(long, 1), (children[1], 0), (other, 1)]
    for _ in range(2):
        plane.decode(group, rows)
    tables = plane.tables()
    for instance in group:
        for sequence in (long, children[1], other):
            assert held(plane, sequence, tables[instance][0], instance) == sequence.homes[instance]
        assert held(plane, children[0], tables[instance][0], instance) == {}
    plane.check(other)


def test_prepare_answers_when_the_program_is_there():
    """A program on another set of instances is made in the background, and announced."""
    data, events = data_plane(), []
    announced = threading.Event()

    def post(event):
        events.append(event)
        announced.set()

    programs = stored_programs(data.builder, data.devices, post)
    plane = Plane(data, programs=programs)
    program = Program(Phase.COPY, 1, CLUSTER.ladder.move_pages)
    plane.executor.submit(Prepare(program, (6,)))
    assert announced.wait(120)
    assert events == [ProgramReady(program, (6,))]
    assert programs.get(program, (6,)) is not None
    plane.close()
    programs.close()


def test_close_ends_the_reader():
    plane = Plane(data_plane())
    sequence = plane.sequence(20)
    issued = plane.issue(plane.prefill_command((0,), [(sequence, 20)], [0]), (sequence,))
    reader = plane.executor._reader
    plane.close()
    assert not reader.is_alive()
    plane.finish(issued)  # what was under way is still told
    plane.check(sequence)
