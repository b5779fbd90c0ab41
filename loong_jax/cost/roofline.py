"""The roofline of ESP steps: each physical term as a function of its own (LoongServe sections 4 and 5).

A term is the ideal time: work divided by a published peak (`hardware.py`). What software makes of it is an
`Efficiency`: how many times longer each term takes, and what is paid per step whatever its size. Terms add up: the
published LoongServe does not overlap links with math, and what overlap hides shows as a smaller factor of the links.
`linearised` writes it as coefficients per DoP, which is what policies calculate with (`fitted.py`).

`dop` instances of `tp` devices each; weights and KV heads are split over tp, tokens over dop.
What it is not: a fit (`calibration.py`), or knowledge of kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from loong_jax.config import ModelConfig
from loong_jax.cost.hardware import Hardware
from loong_jax.types import ContextForm


class Efficiency(msgspec.Struct, frozen=True):
    """Times over the ideal (1.0 is the peak), and seconds per step or ring step that do not depend on its size."""

    prefill_launch_s: float
    prefill_ring_step_s: float  # per layer and hop of the ring: launches, waits
    prefill_linear: float
    prefill_attention: float
    prefill_link: float
    decode_launch_s: float
    decode_weights: float
    decode_kv: float
    decode_rows: float
    decode_exchange: float
    migrate_launch_s: float
    migrate_link: float


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model in the numbers that cost time. Bytes are those of bf16 or float32 weights and KV."""

    num_layers: int
    hidden_size: int
    linear_params: float  # of all layers; each token multiplies with all of them
    head_params: float  # of the output projection; each sampled row multiplies with them
    query_size: int  # num_heads * head_dim
    kv_size: int  # 2 * num_kv_heads * head_dim
    value_bytes: int

    @property
    def kv_token_bytes(self) -> float:
        return float(self.num_layers * self.kv_size * self.value_bytes)

    @property
    def weight_bytes(self) -> float:
        return (self.linear_params + self.head_params) * self.value_bytes


def shape_of(model: ModelConfig) -> Shape:
    query, kv = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    per_layer = model.hidden_size * (2 * query + kv + 3 * model.intermediate_size)
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        linear_params=float(model.num_layers * per_layer),
        head_params=float(model.hidden_size * model.vocab_size),
        query_size=query,
        kv_size=kv,
        value_bytes=4 if model.dtype == "float32" else 2,
    )


class Roofline(msgspec.Struct, frozen=True):
    """Ideal seconds of the parts of a step of one model on instances of `tp` devices."""

    hardware: Hardware
    shape: Shape
    tp: int

    # ---- shared

    def weights_hbm_s(self) -> float:
        """Reading an instance's weights once."""
        return self.shape.weight_bytes / self.tp / self.hardware.hbm_bytes_per_s

    def kv_hbm_s(self, tokens: float) -> float:
        """Reading the KV of `tokens` tokens of one instance."""
        return tokens * self.shape.kv_token_bytes / self.tp / self.hardware.hbm_bytes_per_s

    def kv_link_s(self, tokens: float) -> float:
        """The KV of `tokens` tokens from one instance to another; each device sends its heads."""
        return tokens * self.shape.kv_token_bytes / self.tp / self.hardware.link_bytes_per_s

    def reduce_link_s(self, tokens: float) -> float:
        """The two all-reduces a layer of `tokens` hidden states over an instance's devices, as rings."""
        share = 2 * (self.tp - 1) / self.tp
        bytes_ = 2 * self.shape.num_layers * tokens * self.shape.hidden_size * self.shape.value_bytes * share
        return bytes_ / self.hardware.link_bytes_per_s

    def exchange_link_s(self, dop: int, rows: float) -> float:
        """Queries out, partials (float32 outputs and their lse) back, for `rows` rows over a group."""
        partial_bytes = 4 * self.shape.query_size * (1 + 1 / 64)  # an lse per head; heads of 64 or more
        bytes_ = self.shape.num_layers * rows * (self.shape.query_size * self.shape.value_bytes + partial_bytes)
        return bytes_ / self.tp * (dop - 1) / dop / self.hardware.link_bytes_per_s

    # ---- prefill

    def prefill_linear_math_s(self, dop: int, tokens: float) -> float:
        return 2 * self.shape.linear_params * tokens / (dop * self.tp) / self.hardware.flops

    def prefill_attention_math_s(self, dop: int, pairs: float) -> float:
        """Scores and their sum over values: 4 FLOP for each channel of each (query, key) pair."""
        return 4 * self.shape.num_layers * self.shape.query_size * pairs / (dop * self.tp) / self.hardware.flops

    def prefill_context_hbm_s(self, dop: int, context: float) -> float:
        """Reading resident KV, which bounds the attention of a small chunk over a long context."""
        return self.kv_hbm_s(context / dop)

    def prefill_tokens_link_s(self, dop: int, tokens: float) -> float:
        """All-reduces of an instance's share, and the new KV once around the ring."""
        return self.reduce_link_s(tokens / dop) + self.kv_link_s(tokens * (dop - 1) / dop)

    def prefill_context_link_s(self, dop: int, tokens: float, context: float, form: ContextForm) -> float:
        """Context once around the ring, or queries and partials of the chunk exchanged."""
        if form is ContextForm.RING:
            return self.kv_link_s(context * (dop - 1) / dop)
        return self.exchange_link_s(dop, tokens) if context else 0.0

    # ---- decode

    def decode_rows_math_s(self, rows_per_master: float) -> float:
        params = self.shape.linear_params + self.shape.head_params
        return 2 * params * rows_per_master / self.tp / self.hardware.flops

    def decode_latency_s(self, dop: int, several_masters: bool) -> float:
        """Of the messages a layer waits for: two all-reduces inside an instance, and two exchanges in a group, each
        both ways where several instances are masters."""
        messages = 2 * (self.tp > 1) + 2 * (dop > 1) * (2 if several_masters else 1)
        return self.shape.num_layers * messages * self.hardware.link_latency_s

    # ---- with an efficiency

    def prefill_s(
        self, e: Efficiency, dop: int, tokens: float, pairs: float, context: float, form: ContextForm
    ) -> float:
        launch_s = e.prefill_launch_s + e.prefill_ring_step_s * self.shape.num_layers * (dop - 1)
        linear_s = max(self.prefill_linear_math_s(dop, tokens), self.weights_hbm_s())
        link_s = self.prefill_tokens_link_s(dop, tokens) + self.prefill_context_link_s(dop, tokens, context, form)
        attention_s = max(
            e.prefill_attention * self.prefill_attention_math_s(dop, pairs),
            e.decode_kv * self.prefill_context_hbm_s(dop, context),
        )
        return launch_s + e.prefill_linear * linear_s + attention_s + e.prefill_link * link_s

    def decode_s(self, e: Efficiency, dop: int, rows: float, rows_per_master: float, kv_tokens: float) -> float:
        exchange_s = (
            self.decode_latency_s(dop, rows_per_master < rows)
            + self.reduce_link_s(rows_per_master)
            + self.exchange_link_s(dop, rows)
        )
        return (
            e.decode_launch_s
            + e.decode_weights * self.weights_hbm_s()
            + e.decode_kv * self.kv_hbm_s(kv_tokens)
            + e.decode_rows * self.decode_rows_math_s(rows_per_master)
            + e.decode_exchange * exchange_s
        )


def linearised(roofline: Roofline, e: Efficiency, dops: Iterable[int]) -> dict[str, float]:
    """The coefficients of a `FittedCost` that predicts what `roofline` does with `e`."""
    out = {
        "migrate_base_s": e.migrate_launch_s,
        "migrate_token_s": e.migrate_link * roofline.kv_link_s(1),
    }
    for dop in dops:
        launch_s = e.prefill_launch_s + e.prefill_ring_step_s * roofline.shape.num_layers * (dop - 1)
        one = {
            "prefill_base_s": launch_s,
            "prefill_weights_s": e.prefill_linear * roofline.weights_hbm_s(),
            "prefill_token_s": e.prefill_linear * roofline.prefill_linear_math_s(dop, 1)
            + e.prefill_link * roofline.prefill_tokens_link_s(dop, 1),
            "prefill_pair_s": e.prefill_attention * roofline.prefill_attention_math_s(dop, 1),
            "prefill_context_token_s": e.decode_kv * roofline.prefill_context_hbm_s(dop, 1),
            "prefill_ring_token_s": e.prefill_link * roofline.prefill_context_link_s(dop, 0, 1, ContextForm.RING),
            "prefill_gather_token_s": e.prefill_link * roofline.prefill_context_link_s(dop, 1, 1, ContextForm.GATHER_Q),
            "decode_base_s": e.decode_launch_s
            + e.decode_weights * roofline.weights_hbm_s()
            + e.decode_exchange * roofline.decode_latency_s(dop, False),
            "decode_masters_s": e.decode_exchange
            * (roofline.decode_latency_s(dop, True) - roofline.decode_latency_s(dop, False)),
            "decode_master_row_s": e.decode_rows * roofline.decode_rows_math_s(1)
            + e.decode_exchange * roofline.reduce_link_s(1),
            "decode_row_s": e.decode_exchange * roofline.exchange_link_s(dop, 1),
            "decode_kv_token_s": e.decode_kv * roofline.kv_hbm_s(1),
        }
        out.update({f"{name}.{dop}": value for name, value in one.items()})
    return out
