"""`flash_partial`: a block of queries against a block of keys, positions as data.

One op serves whole prompts, chunks, cached prefixes, windows, striped layouts and ragged batches, because the mask is
computed from (request, position) of both sides. What it is not: the ring around it (`loong_jax/esp`).
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.chips import current_device_kind
from pallas_kernels.dispatch import dispatch
from pallas_kernels.flash_partial import blockwise, gpu, reference, tpu
from pallas_kernels.partial import Partial
from pallas_kernels.tuning import Tuning, tuned

IMPLEMENTATIONS = {
    "tpu": tpu.flash_partial,
    "gpu": gpu.flash_partial,
    "blockwise": blockwise.flash_partial,
    "reference": reference.flash_partial,
}
ORDER = {
    "cpu": ("blockwise", "reference"),
    "tpu": ("tpu", "blockwise", "reference"),
    "gpu": ("gpu", "blockwise", "reference"),
}


def flash_partial(
    q: Float[Array, "tok head dim"],
    k: Float[Array, "ctx kvh dim"],
    v: Float[Array, "ctx kvh dim"],
    q_req: Int[Array, " tok"],
    q_pos: Int[Array, " tok"],
    kv_req: Int[Array, " ctx"],
    kv_pos: Int[Array, " ctx"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    platform: str | None = None,
    implementation: str | None = None,
    tuning: Tuning = (),
) -> Partial:
    """Attention of every query token over the keys it can see, `out f32[tok, head, dim]`, `lse f32[tok, head]`.

    Key `s` is visible to query `t` iff `q_req[t] == kv_req[s] >= 0` and `kv_pos[s] <= q_pos[t]`, and with a `window`
    also `q_pos[t] - kv_pos[s] < window`. A negative request is padding, of either side; what q, k, v hold there
    (also NaN) has no effect, and a query that sees nothing gives the empty partial. Order is free on both sides.
    `head` is a multiple of `kvh`: query head `h` reads KV head `h // (head // kvh)`.

    scale: factor of q . k. window: static or data. soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
    platform, implementation: see `dispatch`. tuning: measured sizes, see `tuning.py`.
    Errors: `ExceptionGroup` of `NotImplementedError` when none serves.
    """
    shape = {"tok": q.shape[0], "ctx": k.shape[0], "group": q.shape[1] // k.shape[1], "dim": q.shape[2]}
    chip = current_device_kind() if tuning else ""
    implementations = tuned(IMPLEMENTATIONS, tuning, chip, "flash_partial", shape)
    return dispatch(
        "flash_partial", implementations, ORDER, q, k, v, q_req, q_pos, kv_req, kv_pos,
        scale=scale, window=window, soft_cap=soft_cap, platform=platform, implementation=implementation,
    )  # fmt: skip
