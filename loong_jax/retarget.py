"""Serialized executables: bring a compiled program to bytes, and back onto the same or another set of devices.

What it is: the one module that touches JAX's private executable API (DESIGN 5 "Programs"). Loading an executable on
devices other than those it was compiled for (*retargeting*) costs 20-35 ms where a backend compile costs seconds, but
nothing promises that it works: `verify` tries it against a direct compile, and who uses `load` for other devices asks
it first, once, at start-up.
What it is not: a place that decides when to compile (`programs.py`) or where bytes are kept (`program_store.py`).
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

# jaxlib has no stubs: to a type checker jax.Device and jax.tree_util.PyTreeDef are variables.
Device = Any
TreeDef = Any


class RetargetError(RuntimeError):
    """An executable could not be serialized, or not be loaded. The caller compiles instead."""


class Serialized(NamedTuple):
    """An executable as bytes. `in_tree` / `out_tree`: JAX tree definitions of ((arguments), {}) and of the result.
    `device_ids`: the devices it was compiled for, in mesh order."""

    payload: bytes
    in_tree: TreeDef
    out_tree: TreeDef
    device_ids: tuple[int, ...]


def serialize(compiled: jax.stages.Compiled, devices: Sequence[Device]) -> Serialized:
    """`devices`: those of the mesh it was compiled for, in order. Raises RetargetError."""
    try:
        payload, in_tree, out_tree = serialize_executable.serialize(compiled)
    except Exception as error:  # the backend, jax and pickle each have their own
        raise RetargetError(f"cannot serialize: {error}") from error
    return Serialized(payload, in_tree, out_tree, tuple(d.id for d in devices))


def load(serialized: Serialized, devices: Sequence[Device]) -> jax.stages.Compiled:
    """The executable on `devices` (in mesh order; as many as it was compiled for). Only public API where the devices
    are the ones it was compiled for. Raises RetargetError."""
    if len(devices) != len(serialized.device_ids):
        raise RetargetError(f"compiled for {len(serialized.device_ids)} devices, asked for {len(devices)}")
    try:
        if serialized.device_ids == tuple(d.id for d in devices):
            return serialize_executable.deserialize_and_load(
                serialized.payload,
                serialized.in_tree,
                serialized.out_tree,
                backend=devices[0].client,
                execution_devices=devices,
            )
        return _load_elsewhere(serialized, devices)
    except Exception as error:
        raise RetargetError(f"cannot load: {type(error).__name__}: {error}") from error


def _load_elsewhere(serialized: Serialized, devices: Sequence[Device]) -> jax.stages.Compiled:
    # Two things tie the bytes to devices: ids in the pickled shardings, mapped by `devices_by_id`, and the device
    # assignment inside the executable, which compile options passed to the deserializer override.
    from jax._src import compiler

    client = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([[d.id for d in devices]]),
        backend=client,
    )

    class Unpickler(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid):
            if pid[0] == "exec":
                return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
            return super().persistent_load(pid)

    unpickler = Unpickler(io.BytesIO(serialized.payload), client, devices)
    unpickler.devices_by_id = dict(zip(serialized.device_ids, devices, strict=True))
    unloaded, args_info, no_kwargs = unpickler.load()
    return jax.stages.Compiled(
        unloaded.load(), [], serialized.in_tree.unflatten(args_info), serialized.out_tree, no_kwargs=no_kwargs
    )


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compile in this thread without writing to JAX's own persistent cache.

    On CPU an executable that came out of that cache serializes, but its bytes cannot be loaded again ("Function ...
    not found", jax 0.10.2 to 0.12), so programs that we serialize ourselves must stay out of it.
    """
    try:
        from jax._src import config

        # Thread-local; jax.config.update would switch the cache off for everybody.
        never = config.persistent_cache_min_compile_time_secs(float("inf"))
    except (ImportError, AttributeError, TypeError) as error:
        log.info("cannot keep programs out of JAX's cache: %s", error)
        never = contextlib.nullcontext()
    with never:
        yield


def verify(devices: Sequence[Device]) -> bool:
    """Whether an executable may be retargeted on this platform with this JAX: a tiny program with the collectives of a
    step and a donated argument is compiled for half of `devices`, retargeted to every second one, and must give the
    same result, on the right devices, in place, as a direct compile there. Takes two tiny compiles; never raises."""
    dop = len(devices) // 2
    if dop == 0:
        return False
    here, there = list(devices[:dop]), list(devices[1 : 2 * dop : 2])
    try:
        moved = load(serialize(_compile_probe(here), here), there)
        wanted = _run_probe(_compile_probe(there), there)
        got = _run_probe(moved, there)
    except Exception as error:
        log.info("retargeting is off: %s: %s", type(error).__name__, error)
        return False
    if not (np.array_equal(wanted.result, got.result) and got.devices == wanted.devices):
        log.warning("retargeting is off: a retargeted program differs from a compiled one")
        return False
    if wanted.in_place and not got.in_place:
        log.warning("retargeting is off: a retargeted program does not honour donation")
        return False
    return True


_PROBE_DIM = 8


def _probe(pool, x):
    dop = jax.lax.axis_size("sp")
    pool = pool.at[0, 1].set(x[0])
    ring = jax.lax.ppermute(pool, "sp", [(r, (r + 1) % dop) for r in range(dop)])
    gathered = jax.lax.all_gather(x, "sp", axis=0, tiled=True)
    exchanged = jax.lax.all_to_all(jnp.broadcast_to(x, (dop, _PROBE_DIM)), "sp", 0, 0)
    total = jax.lax.psum(jnp.tanh(x), "sp")
    return pool, (gathered.sum(0) + exchanged.sum(0) + total[0] + ring.sum((0, 1)) * 0.5)[None]


def _probe_mesh(devices: Sequence[Device]) -> Mesh:
    return Mesh(np.array(devices).reshape(len(devices), 1), ("sp", "tp"))


def _compile_probe(devices: Sequence[Device]) -> jax.stages.Compiled:
    mesh, spec = _probe_mesh(devices), PartitionSpec("sp")
    sharding = NamedSharding(mesh, spec)
    function = jax.shard_map(_probe, in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False)
    with jax.set_mesh(mesh), uncached():
        pool = jax.ShapeDtypeStruct((len(devices), 4, _PROBE_DIM), jnp.float32, sharding=sharding)
        x = jax.ShapeDtypeStruct((len(devices), _PROBE_DIM), jnp.float32, sharding=sharding)
        return jax.jit(function, donate_argnums=(0,)).lower(pool, x).compile()


class _ProbeRun(NamedTuple):
    result: np.ndarray
    devices: list[int]
    in_place: bool


def _run_probe(compiled: jax.stages.Compiled, devices: Sequence[Device]) -> _ProbeRun:
    sharding = NamedSharding(_probe_mesh(devices), PartitionSpec("sp"))
    size = len(devices) * _PROBE_DIM
    x = jax.device_put(np.arange(size, dtype=np.float32).reshape(len(devices), _PROBE_DIM) / size, sharding)
    # Made on the device: a pool that came from host memory is not always donated in place the first time.
    pool = jax.jit(lambda: jnp.ones((len(devices), 4, _PROBE_DIM), jnp.float32), out_shardings=sharding)()
    before = _pointers(pool)
    pool, out = compiled(pool, x)
    result = np.concatenate([np.asarray(pool).ravel(), np.asarray(out).ravel()])
    return _ProbeRun(result, [s.device.id for s in out.addressable_shards], _pointers(pool) == before)


def _pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
