"""Executables move between device sets, keep donation, and what cannot move is refused."""

import jax
import numpy as np
import pytest

from loong_jax import retarget
from loong_jax.types import Phase, Program
from tests.support.small_llama import SmallLlama

ENGINE = SmallLlama(jax.devices()[:8])
DECODE = Program(Phase.DECODE, 2, 4)


def compile_step(program: Program, instances: tuple[int, ...]):
    step, mesh = ENGINE.build(program), ENGINE.mesh_of(instances)
    place = lambda spec: lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.NamedSharding(mesh, spec))
    arguments = [jax.tree.map(place(p), a) for p, a in zip(step.specs, step.arguments, strict=True)]
    with jax.set_mesh(mesh), retarget.uncached():
        compiled = jax.jit(step.function, donate_argnums=step.donate).lower(*arguments).compile()
    return compiled, list(mesh.devices.flat)


def test_verifies_here():
    """Both JAX legs of the suite can retarget on CPU; where one cannot, start-up is slower and this says so."""
    assert retarget.verify(jax.devices()[:8])


def test_verify_of_one_device_is_no():
    assert not retarget.verify(jax.devices()[:1])


@pytest.mark.parametrize("there", [(0, 1), (2, 5), (6, 3)])
def test_step_elsewhere_is_the_same_step(there):
    compiled, here = compile_step(DECODE, (0, 1))
    direct, devices = compile_step(DECODE, there)
    moved = retarget.load(retarget.serialize(compiled, here), devices)

    weights, pool, meta = ENGINE.inputs(DECODE, there)
    _, wanted = direct(weights, pool + 0, meta)
    before = [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards]
    new_pool, got = moved(weights, pool, meta)
    np.testing.assert_array_equal(got, wanted)
    assert pool.is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in new_pool.addressable_shards] == before
    assert [shard.device for shard in got.addressable_shards] == devices


def test_other_number_of_devices_is_refused():
    compiled, here = compile_step(DECODE, (0, 1))
    with pytest.raises(retarget.RetargetError, match="2 devices, asked for 3"):
        retarget.load(retarget.serialize(compiled, here), jax.devices()[:3])


def test_broken_payload_is_refused():
    compiled, here = compile_step(DECODE, (0, 1))
    serialized = retarget.serialize(compiled, here)
    for devices in (here, jax.devices()[2:4]):
        with pytest.raises(retarget.RetargetError, match="cannot load"):
            retarget.load(serialized._replace(payload=serialized.payload[:1000]), devices)


def test_not_serializable_is_refused():
    class NoExecutable:
        _executable = None

    with pytest.raises(retarget.RetargetError, match="cannot serialize"):
        retarget.serialize(NoExecutable(), jax.devices()[:1])  # pyright: ignore[reportArgumentType]


def test_verify_finds_a_program_on_the_wrong_devices(monkeypatch):
    here = jax.devices()[:4]
    monkeypatch.setattr(retarget, "load", lambda serialized, devices: retarget._compile_probe(here))
    assert not retarget.verify(jax.devices()[:8])


def test_verify_finds_a_wrong_result(monkeypatch):
    run = retarget._run_probe
    results = iter([0.0, 1e-6])
    monkeypatch.setattr(
        retarget, "_run_probe", lambda *a: (r := run(*a))._replace(result=r.result + np.float32(next(results)))
    )
    assert not retarget.verify(jax.devices()[:4])


def test_verify_without_the_private_api(monkeypatch):
    monkeypatch.delattr(retarget.serialize_executable, "_JaxPjrtUnpickler")
    assert not retarget.verify(jax.devices()[:4])
