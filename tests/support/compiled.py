"""Step programs compiled on their own, without weights or pools: their memory and their collectives.

`compile_step` takes devices of any kind, also a topology's that are not at hand. What it is not:
`loong_jax/programs.py`, whose executables may come from a store, which forgets what the compiler said.
"""

import re

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.esp.steps import StepBuilder
from loong_jax.types import Program


class Memory(msgspec.Struct, frozen=True):
    """Bytes on one device."""

    state_bytes: int
    alias_bytes: int
    temp_bytes: int


def compile_step(
    model: ModelConfig, cluster: ClusterConfig, program: Program, devices: list, platform: str
) -> jax.stages.Compiled:
    """The program on the first of `devices`."""
    step = StepBuilder(model, cluster, platform).build(program)
    grid = np.array(devices[: program.dop * cluster.tp]).reshape(program.dop, cluster.tp)
    mesh = Mesh(grid, ("sp", "tp"))

    def place(spec: PartitionSpec, argument):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), argument)

    arguments = jax.tree.map(place, step.specs, step.arguments, is_leaf=lambda node: isinstance(node, PartitionSpec))
    with jax.set_mesh(mesh):
        return jax.jit(step.function, donate_argnums=step.donate).lower(*arguments).compile()


def kernels_of(compiled: jax.stages.Compiled) -> list[str]:
    """The kernels of a program for TPU, by the names they were given."""
    calls = re.findall(r"%([\w.]+) = [^\n]* custom_call_target=\"tpu_custom_call\"", compiled.as_text())
    return sorted({call.split(".")[0] for call in calls})


def memory_of(model: ModelConfig, cluster: ClusterConfig, program: Program, devices: list, platform: str) -> Memory:
    return memory_in(compile_step(model, cluster, program, devices, platform), model, cluster, program, platform)


def memory_in(
    compiled: jax.stages.Compiled, model: ModelConfig, cluster: ClusterConfig, program: Program, platform: str
) -> Memory:
    """Of what `compile_step` gave."""
    analysis = compiled.memory_analysis()
    step = StepBuilder(model, cluster, platform).build(program)
    state = [leaf for i in step.donate for leaf in jax.tree.leaves(step.arguments[i])]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in state) // (program.dop * cluster.tp)
    return Memory(state_bytes, analysis.alias_size_in_bytes, analysis.temp_size_in_bytes)
