"""Memory of the compiled steps: the state is donated and aliased whole, and what a step needs besides is small.

On CPU, as float32 and as bit patterns of bfloat16; for TPUs and GPUs `tests/loong_jax/aot/test_compiled.py` does the
same. That addresses of pools do not change is held by all tests that run steps (`tests/support/plane.py`).
"""

from functools import cache

import jax
import msgspec
import pytest

from loong_jax.aot.compiled import Memory, memory_of
from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.kv_pool import pool_bytes
from loong_jax.types import Phase, Program
from tests.support.plane import CLUSTER

MIB = 2**20
F32 = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position=8192,
)
BF16 = msgspec.structs.replace(F32, dtype="bfloat16", head_dim=64)
LARGE = msgspec.structs.replace(CLUSTER, pages_per_instance=4096)  # pools of 64 MiB
PROGRAMS = [
    Program(Phase.PREFILL, 3, 64),
    Program(Phase.PREFILL, 8, 64),
    Program(Phase.DECODE, 3, 4),
    Program(Phase.DECODE, 8, 4),
    Program(Phase.COPY, 1, 8),
    Program(Phase.MIGRATE, 2, 8),
]
MODELS = {"f32": F32, "bf16": BF16}
SLOW = {("f32", 3), ("bf16", 8)}
"""Storage and DoP that are left to the slow leg: the suite has the other two pairs."""


@cache
def memory(model: ModelConfig, cluster: ClusterConfig, program: Program) -> Memory:
    return memory_of(model, cluster, program, jax.devices(), "cpu")


def grid() -> list:
    return [
        pytest.param(model, p, id=f"{name}-{p.phase}-{p.dop}", marks=pytest.mark.slow if (name, p.dop) in SLOW else ())
        for name, model in MODELS.items()
        for p in PROGRAMS
    ]


@pytest.mark.parametrize(("model", "program"), grid())
def test_pools_stay_in_place(model: ModelConfig, program: Program):
    """Aliased: pool, page table and tokens, all of them. Temporaries: less than an eighth of one layer's pool."""
    assert pool_bytes(model, LARGE, "cpu") == 64 * MIB
    found = memory(model, LARGE, program)
    assert found.alias_bytes == found.state_bytes > 64 * MIB
    assert found.temp_bytes < 64 * MIB / model.num_layers / 8


def prefill_memory(**cluster: int) -> Memory:
    return memory(F32, msgspec.structs.replace(LARGE, **cluster), Program(Phase.PREFILL, 8, 64))


def test_prefill_needs_no_more_for_any_context():
    """Context in the ring costs less than four tiles of one layer's KV: between a tile of 4,096 tokens and one of 64,
    temporaries differ by less than four times the KV of the 4,032 tokens. They are fixed when the step is compiled, so
    wherever context lies, and do not grow with the pool or the tables that could hold it."""
    small, large = prefill_memory(), prefill_memory(ring_tokens=4096)
    kv_bytes = (4096 - CLUSTER.ring_tokens) * 2 * F32.num_kv_heads * F32.head_dim * 4
    assert kv_bytes < large.temp_bytes - small.temp_bytes < 4 * kv_bytes
    assert prefill_memory(pages_per_instance=256).temp_bytes == small.temp_bytes
