"""State that lives on an instance's devices between steps: KV pool, page table, newest tokens.

All of it is donated to every step and comes back in place. Arrays carry leading `(sp, tp)` axes so that a group's view
is assembled from its members' buffers without a copy (`esp/groups.py`). The page layout inside `kv` belongs to the
kernels (`pallas_kernels/storage.py`). What it is not: accounting, which is `ledger.py`.
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from loong_jax.config import ClusterConfig, ModelConfig
from loong_jax.local_sizes import pool_dim

Leaf = TypeVar("Leaf")


class InstanceState(NamedTuple, Generic[Leaf]):
    """`kv`: pages `[sp, tp, layers, pages, 2, kv_heads, page_tokens, pool_dim]`; `table`: page-table entries
    `[sp, tp, entries, 3]` of (page, first position, count); `tokens`: newest token of each request slot
    `[sp, tp, slots]`."""

    kv: Leaf
    table: Leaf
    tokens: Leaf


STATE_SPEC = P("sp", "tp")
"""Of every leaf."""


def storage_dtype(model: ModelConfig, platform: str) -> jnp.dtype:
    """bf16 pools are kept as bit patterns on CPU, where XLA would convert the whole pool to f32 at each write."""
    if model.dtype == "bfloat16":
        return jnp.dtype(jnp.uint16 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(jnp.float32)


def state_structs(
    model: ModelConfig, cluster: ClusterConfig, dop: int, platform: str
) -> InstanceState[jax.ShapeDtypeStruct]:
    """Shapes of the assembled state of a group of `dop` instances."""
    kv_heads = max(1, model.num_kv_heads // cluster.tp)
    pages = (model.num_layers, cluster.pages_per_instance, 2, kv_heads, cluster.page_tokens, pool_dim(model, platform))
    lead = (dop, cluster.tp)
    return InstanceState(
        kv=jax.ShapeDtypeStruct((*lead, *pages), storage_dtype(model, platform)),
        table=jax.ShapeDtypeStruct((*lead, cluster.table_entries, 3), jnp.int32),
        tokens=jax.ShapeDtypeStruct((*lead, cluster.slots), jnp.int32),
    )


def pool_bytes(model: ModelConfig, cluster: ClusterConfig, platform: str) -> int:
    """KV bytes of one instance over all its devices."""
    kv = state_structs(model, cluster, 1, platform).kv
    return kv.size * kv.dtype.itemsize


def apply_deltas(table: Int[Array, "entries 3"], deltas: Int[Array, "num 4"]) -> Int[Array, "entries 3"]:
    """Write (entry, page, first, count) rows into the table; an entry out of range is dropped."""
    return table.at[deltas[:, 0]].set(deltas[:, 1:], mode="drop")
