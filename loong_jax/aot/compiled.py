"""Step programs compiled on their own, without weights or pools, and their memory.

`compile_step` takes devices of any kind, also a topology's that are not at hand. What it is not:
`loong_jax/programs.py`, whose executables may come from a store, which forgets what the compiler said.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import msgspec

from loong_jax.aot.hlo import KERNEL, Module
from loong_jax.aot.targets import TargetError
from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.esp.groups import Devices
from loong_jax.esp.steps import StepBuilder
from loong_jax.programs import StepFunction, compiler_options, placed
from loong_jax.retarget import Device
from loong_jax.types import Program


class DoesNotFit(ValueError):
    """The compiler found that a step needs more memory than the device has. The message says how much."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes on one device. `state_bytes`: pool, page table, newest tokens: donated, and aliased by what comes back;
    `argument_bytes`: all arguments as they lie in memory, weights and state too; `weight_bytes`, `pool_bytes`: without
    what tiles add; `output_bytes`: of results that alias no argument; `temp_bytes`: scratch of one step."""

    weight_bytes: int
    pool_bytes: int
    state_bytes: int
    argument_bytes: int
    alias_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int

    @property
    def other_bytes(self) -> int:
        """Page table, tokens, metadata of a step, padding of tiles."""
        return self.argument_bytes - self.weight_bytes - self.pool_bytes

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes + self.temp_bytes + self.code_bytes


class Step(msgspec.Struct, frozen=True):
    """A compiled step. `lower_s`, `compile_s`: seconds of CPU time of this process, and of the wall clock."""

    compiled: Any
    module: Module
    memory: Memory
    lower_s: float
    compile_s: float
    wall_s: float


def compile_step(
    model: ModelConfig, cluster: ClusterConfig, program: Program, devices: Sequence[Device], platform: str
) -> jax.stages.Compiled:
    """The program on the first instances over `devices`. Raises ConfigError for what does not go together, DoesNotFit,
    and TargetError where a slice runs no program of a part of it."""
    return measured(model, cluster, program, devices, platform).compiled


def measured(
    model: ModelConfig, cluster: ClusterConfig, program: Program, devices: Sequence[Device], platform: str
) -> Step:
    """The same, with what the compiler says of it."""
    step = StepBuilder(model, cluster, platform).build(program)
    mesh = Devices(devices, program.dop, cluster.tp).mesh(tuple(range(program.dop)))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        lowered = jax.jit(step.function, donate_argnums=step.donate).lower(*placed(step, mesh))
        lowered_s = time.process_time()
        try:
            compiled = lowered.compile(compiler_options=compiler_options(devices[0]))
        except Exception as error:  # jax raises what the compiler raises, whose classes are not public
            raise _in_words(error) from error
    compiled_s = time.process_time()
    memory = memory_in(compiled, step, program.dop * cluster.tp)
    module = Module(compiled.as_text())
    took_s = time.perf_counter() - wall_s
    return Step(compiled, module, memory, lowered_s - cpu_s, compiled_s - lowered_s, took_s)


def _in_words(error: Exception) -> Exception:
    message = str(error)
    if "limited ICI routing" in message:
        return TargetError(
            "topology: this slice runs only programs over all of its devices (the compiler: limited ICI routing): no "
            "group can be a part of it. Take slices of up to 16 chips, or dop * tp = all devices"
        )
    if "Ran out of memory" in message or "RESOURCE_EXHAUSTED" in message or "Exceeded hbm capacity" in message:
        used = re.search(r"Used [^.]*\.\w+ of [^.]*\.\w+ hbm", message)
        return DoesNotFit(used[0] if used else message[:400])
    return error


def kernels_of(compiled: jax.stages.Compiled) -> list[str]:
    """The Pallas kernels of a program, by the names they were given."""
    lines = [line for line in (compiled.as_text() or "").splitlines() if KERNEL.search(line)]
    calls = [re.search(r"%([\w.]+) = ", line) for line in lines]
    return sorted({call[1].split(".")[0] for call in calls if call})


def memory_of(
    model: ModelConfig, cluster: ClusterConfig, program: Program, devices: Sequence[Device], platform: str
) -> Memory:
    return measured(model, cluster, program, devices, platform).memory


def memory_in(compiled: jax.stages.Compiled, step: StepFunction, num_devices: int) -> Memory:
    """Of a compiled step on so many devices."""
    analysis: Any = compiled.memory_analysis()
    state = [leaf for i in step.donate for leaf in jax.tree.leaves(step.arguments[i])]
    weights = jax.tree.leaves(step.arguments[0]) if 0 not in step.donate else []
    of = lambda leaves: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    dop_and_tp = state[0].shape[:2]
    assert dop_and_tp[0] * dop_and_tp[1] == num_devices
    return Memory(
        weight_bytes=of(weights) // dop_and_tp[1],
        pool_bytes=of(state[:1]) // num_devices,
        state_bytes=of(state) // num_devices,
        argument_bytes=analysis.argument_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        code_bytes=analysis.generated_code_size_in_bytes,
    )
