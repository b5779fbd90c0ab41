"""Who holds which device state now: one assembled view per group in use, regrouped on demand.

Each instance's state belongs to exactly one view. A step takes its group's view, is given the arrays to donate, and
puts the results back; views are split and joined only when the group changes. What it is not: the pools' layout
(`kv_pool.py`) or page accounting (`ledger.py`).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.esp.groups import Devices
from loong_jax.kv_pool import STATE_SPEC, InstanceState, state_structs

Group = tuple[int, ...]
State = InstanceState[jax.Array]


class StateLost(RuntimeError):
    """A member's buffers went with a failed step, and no `reset` has come yet."""


class InstanceStates:
    """The state of all instances with devices in this process."""

    def __init__(self, devices: Devices, model: ModelConfig, cluster: ClusterConfig, platform: str):
        self._devices, self._cluster = devices, cluster
        structs = state_structs(model, cluster, 1, platform)
        self._zeros: dict[int, jax.stages.Compiled] = {}  # of each local instance, so that `reset` compiles nothing
        self._views: dict[Group, State] = {}
        self._group_of: dict[int, Group] = {}
        for instance in range(cluster.num_instances):
            group = (instance,)
            if devices.is_local(group):
                self._zeros[instance] = _zero_maker(structs, devices.sharding(group, STATE_SPEC))
                self._views[group] = self._zeros[instance]()
            self._group_of[instance] = group

    def take(self, instances: Group) -> State:
        """The group's state, to be donated; `put` must follow. Raises StateLost, with all other views left as they
        are."""
        for group in {self._group_of[i] for i in instances}:
            if self._is_lost(group):
                raise StateLost(f"the pools of instances {group} were lost with a step")
        if instances not in self._views:
            self._regroup(instances)
        return self._views[instances]

    def put(self, instances: Group, state: State) -> None:
        self._views[instances] = state

    def reset(self, instances: Group) -> None:
        """Fresh state for instances whose buffers were lost with a failed step."""
        for instance in instances:
            self._release(instance)
        for instance in instances:
            if self._devices.is_local((instance,)):
                self._views[(instance,)] = self._zeros[instance]()
            self._group_of[instance] = (instance,)

    def upload_table(self, instances: Group, rank: int, entries: np.ndarray) -> None:
        """Replace the page table of one member of the group."""
        state = self._views[instances]
        mine = set(self._devices.by_instance[instances[rank]])
        shards = [
            jax.device_put(entries[None, None], shard.device) if shard.device in mine else shard.data
            for shard in state.table.addressable_shards
        ]
        table = self._devices.assemble(instances, STATE_SPEC, state.table.shape, shards)
        self._views[instances] = state._replace(table=table)

    def pool_pointers(self) -> dict[int, list[int]]:
        """Addresses of each local instance's pool buffers: they never change (tests)."""
        out: dict[int, list[int]] = {}
        for view in self._views.values():
            for shard in view.kv.addressable_shards:
                instance = next(i for i, ds in enumerate(self._devices.by_instance) if shard.device in ds)
                out.setdefault(instance, []).append(shard.data.unsafe_buffer_pointer())
        return out

    def _regroup(self, instances: Group) -> None:
        shards: dict[int, list[State]] = {}
        for view in {self._group_of[i] for i in instances}:
            shards |= self._split(view)
        wanted = [part for i in instances for part in shards.pop(i)]
        for instance, parts in shards.items():  # left alone by the split
            self._assemble((instance,), parts)
        self._assemble(instances, wanted)

    def _split(self, group: Group) -> dict[int, list[State]]:
        """Single-device parts of a view by instance; the view is gone."""
        out: dict[int, list[State]] = {i: [] for i in group}
        state = self._views.pop(group, None)
        if state is None:  # no member has a device in this process
            return out
        owner = {device: i for i in group for device in self._devices.by_instance[i]}
        parts = [{s.device: s.data for s in array.addressable_shards} for array in state]
        for device in parts[0]:
            out[owner[device]].append(InstanceState(*(part[device] for part in parts)))
        return out

    def _assemble(self, group: Group, parts: list[State]) -> None:
        for instance in group:
            self._group_of[instance] = group
        if not parts:
            return
        lead = (len(group), self._cluster.tp)
        self._views[group] = InstanceState(
            *(
                self._devices.assemble(group, STATE_SPEC, (*lead, *arrays[0].shape[2:]), list(arrays))
                for arrays in zip(*parts, strict=True)
            )
        )

    def _release(self, instance: int) -> None:
        """Take an instance out of its view, which may hold deleted buffers; the others keep theirs."""
        group = self._group_of[instance]
        if group == (instance,):
            self._views.pop(group, None)
            return
        for other, parts in self._split_alive(group).items():
            self._group_of[other] = (other,)
            if other != instance and parts:
                self._assemble((other,), parts)

    def _split_alive(self, group: Group) -> dict[int, list[State]]:
        if self._is_lost(group):
            self._views.pop(group)
            return {i: [] for i in group}
        return self._split(group)

    def _is_lost(self, group: Group) -> bool:
        state = self._views.get(group)
        return state is not None and any(array.is_deleted() for array in state)


@cache
def _zero_maker(structs: InstanceState[jax.ShapeDtypeStruct], sharding: NamedSharding) -> jax.stages.Compiled:
    """Pools are made by a program: buffers from the host are not always donated in place at first."""
    make = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), structs), out_shardings=sharding)
    with jax.set_mesh(sharding.mesh):  # pyright: ignore[reportArgumentType] (that of `Devices`, never abstract)
        return make.lower().compile()


class GroupWeights:
    """Views of the weights for each group, over one copy per instance. Never donated, so views may overlap."""

    def __init__(self, devices: Devices, weights: list[list]):
        """`weights[instance][tp_rank]`: tree of `[1, *local]` single-device arrays, or None when not local."""
        self._devices, self._weights = devices, weights
        self._views: dict[Group, object] = {}

    def view(self, instances: Group):
        view = self._views.get(instances)
        if view is None:
            shards = [tree for i in instances for tree in self._weights[i] if tree is not None]
            view = self._views[instances] = jax.tree.map(
                lambda *leaves: self._devices.assemble(
                    instances, P("tp"), (self._devices.tp, *leaves[0].shape[1:]), list(leaves)
                ),
                *shards,
            )
        return view
