"""Instances on devices, and arrays of groups assembled without a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from loong_jax.config import ConfigError
from loong_jax.esp.groups import Devices


def test_instances_take_consecutive_devices():
    devices = Devices(list(reversed(jax.devices())), 4, 2)
    assert [[d.id for d in ds] for ds in devices.by_instance] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    mesh = devices.mesh((1, 3))
    assert mesh.axis_names == ("sp", "tp")
    assert [[d.id for d in row] for row in mesh.devices] == [[2, 3], [6, 7]]


def test_too_few_devices():
    with pytest.raises(ConfigError, match=r"num_instances: 9 instances of tp 2 need 18 devices, there are 16"):
        Devices(jax.devices(), 9, 2)


def test_meshes_and_shardings_are_made_once():
    devices = Devices(jax.devices(), 4, 1)
    assert devices.mesh((0, 2)) is devices.mesh((0, 2))
    assert devices.sharding((0, 2), P("sp")) is devices.sharding((0, 2), P("sp"))
    assert devices.is_local((0, 3))
    assert devices.all_local((0, 3))


def test_assemble_copies_nothing():
    """Shards may come in any order; the array is made of the very buffers."""
    devices = Devices(jax.devices(), 4, 2)
    group = (1, 3)
    shards = [
        jax.device_put(jnp.full((1, 1, 5), 10 * i + r), devices.by_instance[i][r]) for i in group for r in range(2)
    ]
    pointers = {shard.unsafe_buffer_pointer() for shard in shards}
    array = devices.assemble(group, P("sp", "tp"), (2, 2, 5), shards[::-1])
    assert {s.data.unsafe_buffer_pointer() for s in array.addressable_shards} == pointers
    assert np.asarray(array)[..., 0].tolist() == [[10, 11], [30, 31]]


def test_resident_rows_lie_on_their_instances():
    devices = Devices(jax.devices(), 4, 2)
    packed = np.arange(6, dtype=np.int32).reshape(2, 3)
    array = devices.resident((0, 2), packed)
    for shard in array.addressable_shards:
        rank = 0 if shard.device in devices.by_instance[0] else 1
        assert (np.asarray(shard.data) == packed[rank : rank + 1]).all()
    assert devices.argument((0, 2), packed) is packed
