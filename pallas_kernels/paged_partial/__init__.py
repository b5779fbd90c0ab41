"""`paged_partial`: rows of one or a few queries against the pages an instance holds for them.

Decode has one query token a row; gather-q prefill has a page of them (DESIGN section 5). What it is not: the exchange
of q and partials between instances (`loong_jax/esp`).
"""

from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.chips import current_device_kind
from pallas_kernels.dispatch import dispatch
from pallas_kernels.paged_partial import blockwise, gpu, reference, tpu
from pallas_kernels.partial import Partial
from pallas_kernels.tuning import Tuning, tuned

IMPLEMENTATIONS = {
    "tpu": tpu.paged_partial,
    "gpu": gpu.paged_partial,
    "blockwise": blockwise.paged_partial,
    "reference": reference.paged_partial,
}
ORDER = {
    "cpu": ("blockwise", "reference"),
    "tpu": ("tpu", "blockwise", "reference"),
    "gpu": ("gpu", "blockwise", "reference"),
}


def paged_partial(
    q: Float[Array, "row qtok head dim"],
    q_pos: Int[Array, "row qtok"],
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    entries: Int[Array, "entry 3"],
    row_start: Int[Array, " row"],
    row_len: Int[Array, " row"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    platform: str | None = None,
    implementation: str | None = None,
    tuning: Tuning = (),
) -> Partial:
    """Attention of each row over its own pages, `out f32[row, qtok, head, dim]`, `lse f32[row, qtok, head]`.

    The table is ragged: row `r` attends to `entries[row_start[r] : row_start[r] + row_len[r]]`, each entry (page, first
    position, count); slot `s < count` of the page holds position `first + s`. Entries may come in any order and rows
    may share them. Visible iff position <= q_pos (and `q_pos - position < window`); `q_pos < 0` is padding. Rows
    without entries and padding give the empty partial. Unused slots, pages and entries may hold anything (also NaN).
    The cost follows the entries that rows have, not the size of the table or of the pool.

    kv_pages: see `storage.py`. layer, window: may be traced. tuning: measured sizes, see `tuning.py`. The
    others as in `flash_partial`.
    """
    rows, qtok, heads, dim = q.shape
    kvh, page_tokens = kv_pages.shape[3:5]
    shape = {"rows": rows, "qtok": qtok, "group": heads // kvh, "dim": dim, "page_tokens": page_tokens}
    chip = current_device_kind() if tuning else ""
    implementations = tuned(IMPLEMENTATIONS, tuning, chip, "paged_partial", shape)
    return dispatch(
        "paged_partial", implementations, ORDER, q, q_pos, kv_pages, layer, entries, row_start, row_len,
        scale=scale, window=window, soft_cap=soft_cap, platform=platform, implementation=implementation,
    )  # fmt: skip
