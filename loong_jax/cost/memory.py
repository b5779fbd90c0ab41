"""What fits into devices: weights, KV and what is left, from a model's configuration alone.

Weights are those of the decoder, vocabulary padded and KV heads replicated where tp asks for it; the norms that some
families have beside two a layer are left out (a ten-thousandth). What it is not: what programs need meanwhile, which
only the compiler knows (`scripts/aot.py`): a share of the memory is kept for it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from loong_jax.config import ConfigError, ModelConfig, ladder_for
from loong_jax.cost.hardware import HARDWARE, Hardware
from loong_jax.local_sizes import local_sizes, pool_dim

MAX_DEVICES = 16_384
_CORES = {"tpu7x": 2}
"""Devices of a chip, where it is not one."""


class Topology(NamedTuple):
    """Devices of one kind, as "v5e:2x4" (chips of a slice) or "H200:8"."""

    hardware: Hardware
    num_devices: int

    @property
    def platform(self) -> str:
        return "tpu" if self.hardware.topology == "torus" else "gpu"


class Fit(NamedTuple):
    """What `tp` devices an instance mean. Bytes are of one device; `room_bytes`: for KV; negative where weights are
    too many. `problem`: why this tp cannot be, "" where it can."""

    tp: int
    instances: int
    dops: tuple[int, ...] = ()
    weight_bytes: int = 0
    kv_token_bytes: int = 0
    room_bytes: int = 0
    problem: str = ""

    @property
    def instance_tokens(self) -> int:
        """Tokens of KV that an instance holds."""
        return max(0, self.room_bytes) // self.kv_token_bytes if self.kv_token_bytes else 0

    @property
    def pool_tokens(self) -> int:
        return self.instances * self.instance_tokens


def topology_of(text: str) -> Topology:
    """Raises ConfigError."""
    found = re.fullmatch(r"([\w-]+):(\d{1,5}(?:x\d{1,5}){0,2})", text)
    if found is None:
        raise ConfigError(f"topology: {text[:100]!r} is not KIND:CHIPS, as in v5e:2x4 or H200:8")
    by_name = {name.lower(): name for name in HARDWARE}
    name = by_name.get(found.group(1).lower())
    if name is None:
        raise ConfigError(f"topology: {found.group(1)!r} is none of {', '.join(HARDWARE)}")
    num_devices = math.prod(map(int, found.group(2).split("x"))) * _CORES.get(name, 1)
    if not 1 <= num_devices <= MAX_DEVICES:
        raise ConfigError(f"topology: {num_devices} devices are not from 1 to {MAX_DEVICES}")
    return Topology(HARDWARE[name], num_devices)


def weight_bytes(model: ModelConfig, tp: int) -> int:
    """Of one device. Raises ConfigError where tp cannot divide the model."""
    local, d, dim = local_sizes(model, tp), model.hidden_size, model.head_dim
    layer = 2 * d + d * local.heads_and_kv * dim + local.num_heads * dim * d + 3 * d * local.intermediate_size
    layer += (local.heads_and_kv * dim if model.qkv_bias else 0) + (d if model.o_bias else 0)
    tables = local.vocab_size * d * (1 if model.tie_embeddings else 2)
    return (model.num_layers * layer + tables + d) * value_bytes(model)


def kv_token_bytes(model: ModelConfig, tp: int, platform: str) -> int:
    """Of one token on one device."""
    heads = local_sizes(model, tp).num_kv_heads
    return 2 * model.num_layers * heads * pool_dim(model, platform) * value_bytes(model)


def value_bytes(model: ModelConfig) -> int:
    return 4 if model.dtype == "float32" else 2


def fits(model: ModelConfig, topology: Topology, share: float) -> list[Fit]:
    """For every tp that divides the devices, the smallest first: what it leaves room for in `share` of the memory."""
    out: list[Fit] = []
    for tp in range(1, topology.num_devices + 1):
        if topology.num_devices % tp == 0:
            out.append(_fit(model, topology, tp, share))
    return out


def _fit(model: ModelConfig, topology: Topology, tp: int, share: float) -> Fit:
    instances = topology.num_devices // tp
    try:
        weights, token = weight_bytes(model, tp), kv_token_bytes(model, tp, topology.platform)
    except ConfigError as error:
        return Fit(tp, instances, problem=str(error))
    room = int(share * topology.hardware.hbm_bytes) - weights
    problem = "" if room >= token else "the weights do not fit"
    return Fit(tp, instances, ladder_for(instances).dops, weights, token, room, problem)


def suggested(found: list[Fit], context: int) -> Fit | None:
    """The smallest tp whose pool holds the model's whole context: the most instances to be elastic with. Where none
    does, the one with the largest pool; None where no weights fit."""
    able = [fit for fit in found if not fit.problem]
    whole = [fit for fit in able if fit.pool_tokens >= context]
    return whole[0] if whole else max(able, key=lambda fit: fit.pool_tokens, default=None)
