"""Moving whole pages outside a prefill: between two instances (migrate), or within one (copy of a fork's open page).

Migration is what the elastic design avoids; it serves to empty an instance in the decode phase and to make room. What
it is not: re-homing while KV circulates, which costs no extra transfer (`prefill.py`).
"""

import jax
from jax import lax
from jaxtyping import Array, Int

from loong_jax.esp.layout import StepShape, transfer_layout
from loong_jax.kv_pool import InstanceState, apply_deltas
from pallas_kernels.storage import read_all_layers, write_all_layers


def transfer_step(
    state: InstanceState[jax.Array], packed: jax.Array, *, shape: StepShape
) -> tuple[InstanceState[jax.Array], Int[Array, " one"]]:
    """Read pages (all layers), swap them with the peer when dop is 2, write what arrived. The second result only tells
    the host that the step is over."""
    fields = transfer_layout(shape).unpack(packed)
    pages = read_all_layers(state.kv, fields["read_page"])
    if shape.dop == 2:
        pages = lax.ppermute(pages, "sp", [(0, 1), (1, 0)])
    kv = write_all_layers(state.kv, fields["write_page"], pages)
    return InstanceState(kv, apply_deltas(state.table, fields["deltas"]), state.tokens), packed[:1]
