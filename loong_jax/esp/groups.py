"""Groups of instances as device meshes, and zero-copy views of what lives on their devices.

An array of a group is assembled from its members' single-device buffers and taken apart again when the group changes:
20 to 50 us of host time and no byte moved, so regrouping is free. What it is not: the choice of groups (`policy/`).
"""

from collections.abc import Sequence
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax.config import ConfigError
from loong_jax.esp.ring_order import in_ring_order
from loong_jax.retarget import Device


class Devices:
    """The devices of every instance: `by_instance[i]` are its `tp` devices, in tp order.

    Instances take devices in the order of a ring over the slice (`ring_order.py`), without one in (process, local
    index) order: ids are not consecutive across processes. `owners[i]`: the process of instance i.
    `mesh(instances)` and `sharding(instances, spec)` are made once; `is_local` and `all_local` tell whether this
    process holds some, or all, devices of a group."""

    def __init__(self, devices: Sequence[Device], num_instances: int, tp: int):
        if len(devices) < num_instances * tp:
            raise ConfigError(
                f"num_instances: {num_instances} instances of tp {tp} need {num_instances * tp} devices, "
                f"there are {len(devices)}"
            )
        self.tp = tp
        self.by_instance = in_ring_order(devices, tp)[:num_instances]
        self.owners = tuple(members[0].process_index for members in self.by_instance)
        self.process_index = jax.process_index()
        self.mesh = cache(self._mesh)
        self.sharding = cache(self._sharding)
        self.all_local = cache(self._all_local)
        self.is_local = cache(self._is_local)

    def _mesh(self, instances: tuple[int, ...]) -> Mesh:
        return Mesh(np.array([self.by_instance[i] for i in instances]), ("sp", "tp"))

    def _sharding(self, instances: tuple[int, ...], spec: P) -> NamedSharding:
        return NamedSharding(self.mesh(instances), spec)

    def _is_local(self, instances: tuple[int, ...]) -> bool:
        return any(d.process_index == self.process_index for i in instances for d in self.by_instance[i])

    def _all_local(self, instances: tuple[int, ...]) -> bool:
        return all(d.process_index == self.process_index for i in instances for d in self.by_instance[i])

    def assemble(
        self, instances: tuple[int, ...], spec: P, shape: tuple[int, ...], shards: list[jax.Array]
    ) -> jax.Array:
        """One array of the group over single-device shards (in any order), without a copy."""
        return jax.make_array_from_single_device_arrays(shape, self.sharding(instances, spec), shards)

    def argument(self, instances: tuple[int, ...], packed: np.ndarray) -> np.ndarray | jax.Array:
        """A `[dop, ...]` host array as a step's argument, row r on instance r of the group. It must not be written
        afterwards: the call itself moves it, at half the host time of a device_put."""
        return packed if self.all_local(instances) else self.resident(instances, packed)

    def resident(self, instances: tuple[int, ...], packed: np.ndarray) -> jax.Array:
        """The same, put on the devices now, to be used by many steps."""
        sharding = self.sharding(instances, P("sp"))
        return jax.make_array_from_callback(packed.shape, sharding, lambda index: packed[index])
