"""Layout of a step's metadata: one int32 row per instance, written on the host, read on the device.

A step's data (units, tables, sampling) is packed into one `[dop, size]` int32 array, because each further argument of
a multi-device call costs host time. Floats travel as bits. What it is not: the meaning of the fields
(`prefill.py`, `decode.py`, `transfer.py`) or who fills them (`loong_jax/staging.py`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from loong_jax.config import ClusterConfig
from loong_jax.types import Phase, Program
from pallas_kernels.tuning import Tuning, parse


class Layout(NamedTuple):
    """Named integer fields, in order, each with its shape per instance."""

    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.fields)

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views `[dop, *shape]` into a packed `[dop, size]` array, by field name."""
        out, offset = {}, 0
        for name, shape in self.fields:
            count = math.prod(shape)
            out[name] = packed[:, offset : offset + count].reshape((packed.shape[0], *shape))
            offset += count
        return out

    def unpack(self, packed: Int[Array, " size"]) -> dict[str, jax.Array]:
        """The fields of one instance's row, inside a step."""
        out, offset = {}, 0
        for name, shape in self.fields:
            count = math.prod(shape)
            out[name] = packed[offset : offset + count].reshape(shape)
            offset += count
        return out


class StepShape(NamedTuple):
    """Everything static about a step: one program of the ladder on one cluster configuration."""

    dop: int
    bucket: int
    page_tokens: int
    num_pages: int
    num_slots: int
    ring_pages: int  # pages of one context tile
    query_tile_units: int  # units per instance of one gather-q tile
    prefill_rows: int
    num_deltas: int  # page-table updates one step can carry
    platform: str  # what it is compiled for, which need not be at hand
    attention: str | None  # the implementation of attention; None: the best that serves the platform
    tuning: Tuning  # measured sizes of kernels
    scores: bool  # a prefill that gives log-probabilities of what it computes
    vocab_size: int
    num_adjust: int  # tokens of one row whose logits may be changed one by one
    num_top: int  # likeliest tokens reported for a row

    @property
    def num_units(self) -> int:
        """Units per instance of a prefill step."""
        return self.bucket // self.page_tokens

    @property
    def sampled_size(self) -> int:
        """Integers that a step gives for a row: token, log-probability bits, likeliest tokens, their bits."""
        return 2 + 2 * self.num_top


def step_shape(program: Program, cluster: ClusterConfig, platform: str, vocab_size: int) -> StepShape:
    is_prefill = program.phase in (Phase.PREFILL, Phase.SCORE)
    per_step = program.bucket // cluster.page_tokens if is_prefill else program.bucket
    return StepShape(
        dop=program.dop,
        bucket=program.bucket,
        page_tokens=cluster.page_tokens,
        num_pages=cluster.pages_per_instance,
        num_slots=cluster.slots,
        ring_pages=cluster.ring_tokens // cluster.page_tokens,
        query_tile_units=math.gcd(cluster.query_tile_tokens // cluster.page_tokens, per_step),
        prefill_rows=cluster.ladder.prefill_rows,
        num_deltas=2 * per_step + 32,
        platform=platform,
        attention="blockwise" if cluster.attention == "reference" else None,
        tuning=parse(cluster.kernel_sizes),
        scores=program.phase is Phase.SCORE,
        vocab_size=vocab_size,
        num_adjust=min(cluster.adjust_tokens, vocab_size),
        num_top=min(cluster.max_top, vocab_size),
    )


SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "min_p", "num_top")
UNIT_ROW, UNIT_FIRST, UNIT_COUNT, UNIT_HOME = range(4)
NOWHERE = -1


def prefill_layout(shape: StepShape) -> Layout:
    """`units`: (batch row or -1, first position, count, home = rank * num_pages + page); `context_*`: this instance's
    page-table entries of each batch row; `rope_len`: of each row; `emit_*`: which local token of a row, if any, is
    sampled from; `targets`: the token after each of `tokens`; `num_score_tiles`, `num_score_top`: how many tiles are
    scored, and how many likeliest tokens are wanted."""
    rows = (shape.prefill_rows,)
    scoring = (("targets", (shape.bucket,)), ("num_score_tiles", ()), ("num_score_top", ())) if shape.scores else ()
    return Layout(
        (
            ("units", (shape.num_units, 4)),
            ("tokens", (shape.bucket,)),
            ("context_start", rows),
            ("context_len", rows),
            ("rope_len", rows),
            ("emit_index", rows),
            ("emit_slot", rows),
            ("emit_position", rows),
            *((name, rows) for name in SAMPLING_FIELDS),
            ("num_ring_tiles", ()),
            ("num_query_tiles", ()),
            ("num_emits", ()),
            *scoring,
            ("deltas", (shape.num_deltas, 4)),
        )
    )


OWN_FIELDS = ("token", "slot", "position", "write_page", "write_slot", "rope_len", *SAMPLING_FIELDS)


def decode_layout(shape: StepShape) -> Layout:
    """`own`: the rows this instance masters, columns as in OWN_FIELDS (a token of -1: the device has it); `every`:
    (slot, position) of every row of the group, in rank order; `ranges`: (start, length) of its entries here."""
    num_rows = shape.dop * shape.bucket
    return Layout(
        (
            ("own", (shape.bucket, len(OWN_FIELDS))),
            ("every", (num_rows, 2)),
            ("ranges", (num_rows, 2)),
            ("deltas", (shape.num_deltas, 4)),
        )
    )


def adjust_layout(shape: StepShape, num_rows: int) -> Layout:
    """Changes of the logits of an instance's rows, zero for none: an array of its own, as it is large and mostly blank.
    `num_entries` of `entries` count: token, bits of an addend before the repetition penalty, and after it; `seen`: the
    tokens of prompt and output, token t at bit t // words of word t % words; `repetition`: the penalty's bits, or 0;
    `allowed`: the only tokens that may be sampled, as bits like `seen`, where the row is `constrained` (1, or 0).
    The long axis is the last one, for TPU pads it to 128."""
    words = -(-shape.vocab_size // 32)
    return Layout(
        (
            ("num_entries", (num_rows,)),
            ("repetition", (num_rows,)),
            ("entries", (num_rows, 3, shape.num_adjust)),
            ("seen", (num_rows, words)),
            ("constrained", (num_rows,)),
            ("allowed", (num_rows, words)),
        )
    )


def adjust_layout_of(phase: Phase, shape: StepShape) -> Layout:
    return adjust_layout(shape, shape.bucket if phase is Phase.DECODE else shape.prefill_rows)


def transfer_layout(shape: StepShape) -> Layout:
    """`read_page` pages leave this instance (to itself in a copy, to its peer in a migrate); what arrives is written
    to `write_page`. Unused places hold `num_pages`, which drops."""
    return Layout((("read_page", (shape.bucket,)), ("write_page", (shape.bucket,)), ("deltas", (shape.num_deltas, 4))))


def layout_of(phase: Phase, shape: StepShape) -> Layout:
    match phase:
        case Phase.PREFILL | Phase.SCORE:
            return prefill_layout(shape)
        case Phase.DECODE:
            return decode_layout(shape)
        case _:
            return transfer_layout(shape)


def bits_to_float(bits: Int[Array, "..."]) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def float_to_bits(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
