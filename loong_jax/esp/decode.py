"""One decode step over a group: several masters, KV anywhere, two collectives a layer.

Rows are spread over masters. A master computes QKV, FFN and sampling of its rows and stores their new KV in its own
open page. Per layer queries are all-gathered, each instance attends with what it holds, and partials return to the
masters in one all-to-all, so communication does not grow with context and an added instance moves nothing (LoongServe
4.2, multi-master decoding). Local attention of a master's own rows does not wait for the exchange.

The input token of a row is data, or the newest token the device sampled for it: the step after it need not wait for the
host. What it is not: batching or the choice of masters (`policy/`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from loong_jax.config import ModelConfig
from loong_jax.esp.layout import OWN_FIELDS, StepShape, adjust_layout, decode_layout
from loong_jax.esp.prefill import exchange
from loong_jax.esp.sampled import sampled_rows
from loong_jax.kv_pool import InstanceState, apply_deltas
from loong_jax.model.decoder import Attend, decode_stack, layer_window, logits
from pallas_kernels.paged_partial import paged_partial
from pallas_kernels.partial import Partial, merge, merge_many
from pallas_kernels.storage import write_slots


class Rows(NamedTuple):
    """The rows of the group, in rank order: position of each, and its page-table entries on this instance."""

    position: Int[Array, " row"]
    start: Int[Array, " row"]
    length: Int[Array, " row"]


def decode_attention(
    own: dict[str, jax.Array], every: Rows, table: jax.Array, model: ModelConfig, shape: StepShape
) -> Attend:
    """The model's attention argument for a decode step; the carry is the pool."""
    rows, dop = shape.bucket, shape.dop
    first_own = lax.axis_index("sp") * rows
    start, length = every.start, every.length
    own_start = lax.dynamic_slice_in_dim(start, first_own, rows)
    own_length = lax.dynamic_slice_in_dim(length, first_own, rows)
    # own rows are attended from the local queries, so they are empty among the gathered ones
    others_length = lax.dynamic_update_slice_in_dim(length, jnp.zeros_like(own_length), first_own, 0)

    def partial_of(q, position, kv_pages, layer, start, length) -> Partial:
        part = paged_partial(
            q[:, None], position[:, None], kv_pages, layer, table, start, length,
            scale=model.attention_scale, window=layer_window(model, layer), soft_cap=model.attn_soft_cap,
            platform=shape.platform, implementation=shape.attention, tuning=shape.tuning,
        )  # fmt: skip
        return Partial(part.out[:, 0], part.lse[:, 0])

    def attend(kv_pages, layer, q, k, v):
        kv_pages = write_slots(kv_pages, layer, own["write_page"], own["write_slot"], k, v)
        partial = partial_of(q, own["position"], kv_pages, layer, own_start, own_length)
        if dop > 1:
            gathered = lax.all_gather(q, "sp", tiled=True)
            others = partial_of(gathered, every.position, kv_pages, layer, start, others_length)
            partial = merge(partial, merge_many(exchange(others, dop)))
        return partial.out.astype(q.dtype), kv_pages

    return attend


def decode_step(
    params,
    state: InstanceState[jax.Array],
    packed: jax.Array,
    adjust: jax.Array,
    *,
    model: ModelConfig,
    shape: StepShape,
):
    """One token for each row. Local arguments of one device, as in `prefill_step`. Returns the state and
    `[dop * rows, sampled_size]` (`sampled.py`) in rank order, the same on every rank."""
    fields = decode_layout(shape).unpack(packed)
    own = {name: fields["own"][:, column] for column, name in enumerate(OWN_FIELDS)}
    every = Rows(fields["every"][:, 1], fields["ranges"][:, 0], fields["ranges"][:, 1])
    table = apply_deltas(state.table, fields["deltas"])
    held = state.tokens.at[own["slot"]].get(mode="fill", fill_value=0)
    token = jnp.where(own["token"] >= 0, own["token"], held)
    position = jnp.maximum(own["position"], 0)
    attend = decode_attention(own, every, table, model, shape)
    rope_len = own["rope_len"] if model.rope_by_length else None
    hidden, kv = decode_stack(params, model, token, position, attend, state.kv, rope_len=rope_len, tp_axis="tp")
    adjustment = adjust_layout(shape, shape.bucket).unpack(adjust)
    sampled = sampled_rows(logits(params, model, hidden, tp_axis="tp"), own, adjustment, position + 1, shape)
    if shape.dop > 1:
        sampled = lax.all_gather(sampled, "sp", tiled=True)
    tokens = state.tokens.at[fields["every"][:, 0]].set(sampled[:, 0], mode="drop")
    return InstanceState(kv, table, tokens), sampled
