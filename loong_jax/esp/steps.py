"""From an entry of the program ladder to a function of sharded arrays, ready to be compiled for any device set.

A step is a shard_map without a mesh: traced once under `jax.set_mesh`, then compiled per device set (`programs.py`).
What it is not: the steps themselves (`prefill.py`, `decode.py`, `transfer.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.esp.decode import decode_step
from loong_jax.esp.layout import StepShape, adjust_layout_of, layout_of, step_shape
from loong_jax.esp.prefill import prefill_step
from loong_jax.esp.transfer import transfer_step
from loong_jax.kv_pool import STATE_SPEC, InstanceState, state_structs
from loong_jax.model.decoder import param_structs
from loong_jax.programs import StepFunction
from loong_jax.types import Phase, Program


def _drop_lead(tree, num_axes: int):
    return jax.tree.map(lambda x: x.reshape(x.shape[num_axes:]), tree)


def _add_lead(tree, num_axes: int):
    return jax.tree.map(lambda x: x.reshape((1,) * num_axes + x.shape), tree)


def _local_prefill(params, state, packed, adjust, moves, *, model, shape):
    state, *sampled = prefill_step(
        _drop_lead(params, 1), _drop_lead(state, 2), packed[0], adjust[0], moves[0], model=model, shape=shape
    )
    return _add_lead(state, 2), *sampled


def _local_decode(params, state, packed, adjust, *, model, shape):
    state, sampled = decode_step(
        _drop_lead(params, 1), _drop_lead(state, 2), packed[0], adjust[0], model=model, shape=shape
    )
    return _add_lead(state, 2), sampled


def _local_transfer(state, packed, *, shape):
    state, done = transfer_step(_drop_lead(state, 2), packed[0], shape=shape)
    return _add_lead(state, 2), done


class StepBuilder:
    """Builds the step function of a program for one model on one cluster configuration.

    `platform` ("cpu", "tpu", "gpu") decides the pool's storage and whether layers are stacked and scanned."""

    def __init__(self, model: ModelConfig, cluster: ClusterConfig, platform: str):
        self.model, self.cluster, self.platform = model, cluster, platform

    @property
    def stacked(self) -> bool:
        """On CPU a scan over stacked weights copies each layer's weights; elsewhere it saves compile time."""
        return self.platform != "cpu"

    def shape(self, program: Program) -> StepShape:
        return step_shape(program, self.cluster, self.platform, self.model.vocab_size)

    def build(self, program: Program) -> StepFunction:
        shape = self.shape(program)
        params = param_structs(self.model, self.cluster.tp, stacked=self.stacked)
        state = state_structs(self.model, self.cluster, program.dop, self.platform)
        packed = jax.ShapeDtypeStruct((program.dop, layout_of(program.phase, shape).size), jnp.int32)
        adjust = jax.ShapeDtypeStruct((program.dop, adjust_layout_of(program.phase, shape).size), jnp.int32)
        moves = jax.ShapeDtypeStruct((program.dop, self.cluster.table_entries), jnp.int32)
        match program.phase:
            case Phase.PREFILL | Phase.SCORE:
                local = partial(_local_prefill, model=self.model, shape=shape)
                arguments = (params, state, packed, adjust, moves)
                specs = (P("tp"), STATE_SPEC, P("sp"), P("sp"), P("sp"))
                out_specs = (STATE_SPEC, P(), P()) if shape.scores else (STATE_SPEC, P())
            case Phase.DECODE:
                local = partial(_local_decode, model=self.model, shape=shape)
                arguments, specs = (params, state, packed, adjust), (P("tp"), STATE_SPEC, P("sp"), P("sp"))
                out_specs = (STATE_SPEC, P())
            case _:
                local = partial(_local_transfer, shape=shape)
                arguments, specs = (state, packed), (STATE_SPEC, P("sp"))
                out_specs = (STATE_SPEC, P("sp"))
        function = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
        donate = tuple(i for i, argument in enumerate(arguments) if isinstance(argument, InstanceState))
        return StepFunction(function, arguments, specs, donate)
