"""The ladder: where an executable comes from, that it is traced once, who waited for it, and which sets there are."""

import contextlib
import gc
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax import mappings, retarget
from loong_jax.device_sets import on_sets
from loong_jax.mappings import num_mappings
from loong_jax.program_store import ProgramStore, enable_jax_cache
from loong_jax.programs import Programs, ProgramsFull, StepFunction
from loong_jax.types import Phase, Program, ProgramReady

DEVICES = jax.devices()
POOL = (3, 16)


class Engine:
    """A step that adds up a group's metadata; counts how often it is built and traced."""

    def __init__(self, tp: int = 1):
        self.tp, self.num_builds, self.num_traces = tp, 0, 0
        self.hold = threading.Event()
        self.hold.set()

    def mesh_of(self, instances):
        return Mesh(np.array([DEVICES[i * self.tp : (i + 1) * self.tp] for i in instances]), ("sp", "tp"))

    def build(self, program: Program) -> StepFunction:
        self.num_builds += 1
        self.hold.wait(60)

        def step(weights, pool, meta):
            self.num_traces += 1
            total = jax.lax.psum(meta * weights["w"][0][0, 0], ("sp", "tp"))
            return pool.at[0, program.bucket].add(total[0, 0]), total + pool[0, program.bucket]

        specs = (P("tp"), P("sp"), P("sp"))
        arguments = (
            {"w": [jax.ShapeDtypeStruct((self.tp, 4), jnp.int32)]},
            jax.ShapeDtypeStruct((program.dop * POOL[0], POOL[1]), jnp.int32),
            jax.ShapeDtypeStruct((program.dop, 8), jnp.int32),
        )
        function = jax.shard_map(step, in_specs=specs, out_specs=(P("sp"), P()), check_vma=False)
        return StepFunction(function, arguments, specs, donate=(1,))

    def check(self, compiled, instances):
        """Call it as the executor would."""
        mesh, dop = self.mesh_of(instances), len(instances)
        weights = {"w": [jax.device_put(np.full((self.tp, 4), 2, np.int32), NamedSharding(mesh, P("tp")))]}
        pool = jax.device_put(np.zeros((dop * POOL[0], POOL[1]), np.int32), NamedSharding(mesh, P("sp")))
        meta = np.arange(dop * 8, dtype=np.int32).reshape(dop, 8)
        new_pool, total = compiled(weights, pool, meta)
        np.testing.assert_array_equal(total[0], 2 * self.tp * meta.sum(0))
        assert pool.is_deleted()
        assert new_pool.sharding.device_set == set(mesh.devices.flat)


@pytest.fixture
def start():
    """Makes Programs and closes them."""
    made = []

    def make(engine, store=None, fingerprint="f"):
        events = []
        programs = Programs(engine.build, engine.mesh_of, store, events.append, fingerprint)
        programs.events = events
        made.append((engine, programs))
        return programs

    yield make
    for engine, programs in made:
        engine.hold.set()
        programs.close()


@pytest.fixture
def no_retarget(monkeypatch):
    monkeypatch.setattr(retarget, "verify", lambda devices: False)


def origins(programs):
    return {str(origin): count for (_, origin), count in programs._after_ready.items()}


SETS = [(0, 1), (1, 2), (0, 5), (3, 6)]
DECODE = Program(Phase.DECODE, 2, 4)


def test_one_trace_and_one_compile_serve_all_sets(start):
    engine = Engine()
    programs = start(engine)
    programs.mark_ready()
    for instances in SETS:
        assert programs.get(DECODE, instances) is None
        compiled = programs.compile(DECODE, instances)
        assert programs.get(DECODE, instances) is compiled
        assert programs.compile(DECODE, instances) is compiled
        engine.check(compiled, instances)
    assert (engine.num_builds, engine.num_traces) == (1, 1)
    assert origins(programs) == {"compile": 1, "retarget": 3}
    assert (programs.compiles_after_ready, programs.loads_after_ready) == (1, 3)
    assert programs.events == []
    assert set(programs.ready) == {(DECODE, instances) for instances in SETS}


def test_closing_lets_go_of_what_was_compiled(start, no_retarget):
    """The functions they were compiled from would keep executables, and so memory mappings, for good."""
    programs = start(Engine())
    programs.compile(DECODE, SETS[0])  # what the first compilation brings with it stays
    before = num_mappings()
    for instances in SETS[1:]:
        programs.compile(DECODE, instances)
    compiled = num_mappings()
    programs.close()
    gc.collect()
    assert compiled - before > 10
    assert num_mappings() <= before


def test_without_retargeting_each_set_is_compiled_from_one_trace(start, no_retarget):
    engine = Engine()
    programs = start(engine)
    programs.mark_ready()
    for instances in SETS:
        engine.check(programs.compile(DECODE, instances), instances)
    assert (engine.num_builds, engine.num_traces) == (1, 1)
    assert origins(programs) == {"compile": 4}


def test_what_does_not_serialize_is_compiled(start, tmp_path, monkeypatch):
    def refuse(*_):
        raise retarget.RetargetError("constants")

    programs = start(engine := Engine(), ProgramStore(tmp_path))
    monkeypatch.setattr(retarget, "verify", lambda devices: True)
    monkeypatch.setattr(retarget, "serialize", refuse)
    programs.mark_ready()
    for instances in SETS[:2]:
        engine.check(programs.compile(DECODE, instances), instances)
    assert origins(programs) == {"compile": 2}
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_load_is_compiled(start, tmp_path, monkeypatch, caplog):
    start(engine := Engine(), store := ProgramStore(tmp_path)).compile(DECODE, (0, 1))

    def refuse(*_):
        raise retarget.RetargetError("no such function")

    monkeypatch.setattr(retarget, "verify", lambda devices: True)
    monkeypatch.setattr(retarget, "load", refuse)
    programs = start(engine, store)
    programs.mark_ready()
    for instances in SETS[:2]:
        engine.check(programs.compile(DECODE, instances), instances)
    assert origins(programs) == {"compile": 2}
    assert "no such function" in caplog.text


@pytest.mark.parametrize("retargets", [True, False])
def test_warm_store_needs_no_build_no_trace_no_compile(start, tmp_path, monkeypatch, retargets):
    if not retargets:
        monkeypatch.setattr(retarget, "verify", lambda devices: False)
    pairs = on_sets([DECODE, Program(Phase.PREFILL, 1, 2)], [*SETS, (0,), (7,)])
    start(Engine(), ProgramStore(tmp_path)).warm_up(pairs)
    assert len(list(tmp_path.iterdir())) == (2 if retargets else len(pairs))

    programs = start(engine := Engine(), ProgramStore(tmp_path))
    programs.mark_ready()
    for program, instances in pairs:
        engine.check(programs.compile(program, instances), instances)
    assert (engine.num_builds, engine.num_traces) == (0, 0)
    assert origins(programs) == ({"store": 2, "retarget": 4} if retargets else {"store": 6})


def test_other_fingerprint_tp_or_options_is_another_program(start, tmp_path):
    store = ProgramStore(tmp_path)
    for engine, fingerprint in ((Engine(), "f"), (Engine(), "g"), (Engine(tp=2), "g")):
        engine.check(start(engine, store, fingerprint).compile(DECODE, (0, 1)), (0, 1))
        assert engine.num_builds == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_corrupt_entry_is_compiled_and_replaced(start, tmp_path):
    start(Engine(), store := ProgramStore(tmp_path)).compile(DECODE, (0, 1))
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-5])
    engine = Engine()
    engine.check(start(engine, store).compile(DECODE, (0, 1)), (0, 1))
    assert engine.num_traces == 1
    start(engine := Engine(), store).compile(DECODE, (0, 1))
    assert engine.num_traces == 0


def test_executables_out_of_jax_cache_are_not_stored(start, tmp_path, monkeypatch):
    """On CPU their serialized form does not load. They appear when the private switch of `uncached` is gone."""
    before = {name: jax.config.values[name] for name in jax.config.values if "cache" in name}
    monkeypatch.setattr(retarget, "uncached", contextlib.nullcontext)
    enable_jax_cache(tmp_path / "jax")
    try:
        for expected_entries in (1, 0):
            store = ProgramStore(tmp_path / str(expected_entries))
            programs = start(engine := Engine(), store)
            engine.check(programs.compile(DECODE, (0, 1)), (0, 1))
            assert len(list(store.directory.iterdir())) == expected_entries
            engine.check(programs.compile(DECODE, (1, 2)), (1, 2))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_warm_up_reports_progress_and_is_not_counted(start):
    programs, seen = start(engine := Engine()), []
    pairs = on_sets([DECODE, Program(Phase.DECODE, 1, 4)], [*SETS, (0,), (3,)])
    programs.warm_up(pairs, lambda done, total: seen.append((done, total)))
    programs.mark_ready()
    assert seen == [(i, len(pairs)) for i in range(1, len(pairs) + 1)]
    assert sorted(programs.ready) == sorted(pairs)
    for program, instances in pairs:
        engine.check(programs.compile(program, instances), instances)
    assert origins(programs) == {}


def test_warm_up_raises_what_a_build_raises(start):
    programs = start(engine := Engine())
    engine.build = None
    programs._maker._build = lambda program: 1 / 0
    with pytest.raises(ZeroDivisionError):
        programs.warm_up([(DECODE, (0, 1)), (DECODE, (2, 3))])


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("did not happen")


def test_prepare_answers_once_and_again_when_asked_again(start):
    programs = start(engine := Engine())
    programs.mark_ready()
    engine.hold.clear()
    for _ in range(3):
        programs.prepare(DECODE, (0, 1))
    programs.prepare(DECODE, (2, 3))
    assert programs.events == []
    engine.hold.set()
    wait_for(lambda: programs.get(DECODE, (2, 3)) is not None)
    wait_for(lambda: ProgramReady(DECODE, (2, 3)) in programs.events)
    assert ProgramReady(DECODE, (0, 1)) in programs.events
    programs.prepare(DECODE, (0, 1))  # there: answered in this call
    assert programs.events[-1] == ProgramReady(DECODE, (0, 1))
    assert engine.num_builds == 1
    assert (programs.compiles_after_ready, programs.background_compiles_after_ready) == (0, 1)
    assert programs.stray_compiles_after_ready == 0


def test_serving_path_joins_a_compile_under_way(start):
    """The caller waits for the background's compile instead of starting its own."""
    programs = start(engine := Engine())
    programs.mark_ready()
    engine.hold.clear()
    programs.prepare(DECODE, (0, 1))
    wait_for(lambda: engine.num_builds == 1)
    result = []
    caller = threading.Thread(target=lambda: result.append(programs.compile(DECODE, (0, 1))))
    caller.start()
    engine.hold.set()
    caller.join(60)
    assert result == [programs.get(DECODE, (0, 1))]
    assert engine.num_builds == 1
    assert programs.compiles_after_ready == 0


def test_failed_prepare_is_logged_and_tried_again(start, caplog):
    programs = start(engine := Engine())
    build, programs._maker._build = engine.build, lambda program: 1 / 0
    programs.prepare(DECODE, (0, 1))
    wait_for(lambda: "cannot make" in caplog.text)
    assert programs.events == []
    programs._maker._build = build
    programs.prepare(DECODE, (0, 1))
    wait_for(lambda: programs.events == [ProgramReady(DECODE, (0, 1))])


def test_close_drops_what_is_queued(start):
    programs = start(engine := Engine())
    engine.hold.clear()
    programs.prepare(DECODE, (0, 1))
    wait_for(lambda: engine.num_builds == 1)
    programs.prepare(Program(Phase.DECODE, 1, 4), (0,))
    closing = threading.Thread(target=programs.close)
    closing.start()
    wait_for(lambda: not programs._pending)
    engine.hold.set()
    closing.join(60)
    assert not closing.is_alive()
    assert engine.num_builds == 1
    programs._background = threading.Thread(target=lambda: None)  # the fixture closes again
    programs._background.start()


def test_stray_compiles_are_seen(start):
    programs = start(Engine())
    jax.jit(lambda x: x * 3 + 1)(jnp.zeros(17))
    programs.mark_ready()
    programs.compile(DECODE, (0, 1))
    assert programs.stray_compiles_after_ready == 0
    x = np.zeros(19, np.float32)
    function = jax.jit(lambda x: x * 5 + 1)
    function(x)
    assert programs.stray_compiles_after_ready == 1
    function(x)
    assert programs.stray_compiles_after_ready == 1


class Elsewhere:
    """A device of another process."""

    process_index = 1


def test_programs_of_other_processes_are_skipped(start):
    programs = start(Engine())
    programs._mesh_of = lambda instances: Mesh(np.array([[Elsewhere()]], dtype=object), ("sp", "tp"))
    programs.prepare(DECODE, (0, 1))
    programs.warm_up([(DECODE, (0, 1))])
    assert programs.ready == ()
    assert programs.events == []


def test_a_full_process_is_told_at_start_and_serves_on_later(start, monkeypatch, caplog):
    """Past its memory mappings a process dies in the compiler: `warm_up` raises, `prepare` logs and goes on."""
    programs = start(engine := Engine())
    programs.warm_up([(DECODE, (0, 1))])
    full = threading.Event()
    full.set()
    monkeypatch.setattr(mappings, "room_for_executable", lambda: not full.is_set())
    with pytest.raises(ProgramsFull, match="max_map_count"):
        programs.warm_up([(DECODE, (0, 1)), (DECODE, (1, 2))])
    programs.mark_ready()
    programs.prepare(DECODE, (1, 2))
    programs.prepare(DECODE, (0, 1))  # what is there is still there
    engine.check(programs.get(DECODE, (0, 1)), (0, 1))
    wait_until(lambda: "max_map_count" in caplog.text)
    assert programs.events == [ProgramReady(DECODE, (0, 1))]
    full.clear()
    programs.prepare(DECODE, (1, 2))
    wait_until(lambda: len(programs.events) == 2)
    assert programs.events[1] == ProgramReady(DECODE, (1, 2))
    assert programs.compiles_after_ready == 0


def wait_until(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
