"""The layout of KV pages, private to `kv_pool` and the kernels, and the ways in and out of it.

A pool is one array `[layers, pages, 2, kvh, page_tokens, pool_dim]`: axis 2 is K then V; `pool_dim >= dim` is the
head dimension padded with zeros to the lanes of the hardware. Its dtype is float32, bfloat16, or uint16 holding the bit
patterns of bfloat16: XLA's CPU backend rewrites bfloat16 arithmetic to float32 and converts the *whole* pool for it.
What it is not: a page table or an allocator (those are the ledger and `kv_pool`).

Every write is in place when the pool is donated or carried through a loop, also where the loop reads it. One order is
left to the caller: XLA's CPU backend copies the pool when a read by a loop (`paged_partial`) and a later write do not
depend on each other. Write first, then read; or write what the read gave.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

K, V = 0, 1
"""Indices on axis 2 of a pool."""


def decode_bits(stored: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Stored elements as floats: uint16 bit patterns become bfloat16, floats stay as they are."""
    return lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


def encode_bits(values: Float[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Floats as elements of a pool of `dtype`."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


def _pad_dim(values: Array, pool_dim: int) -> Array:
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pool_dim - values.shape[-1])])


def gather_heads(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    pages: Int[Array, "*tile n"],
    dim: int,
) -> Float[Array, "2 *tile kvh ctx dim"]:
    """K and V of whole pages of one layer, heads outside: what attention eats. Otherwise as `gather_pages`; leading
    axes of `pages` stay."""
    _, num_pages, _, kvh, page_tokens, _ = kv_pages.shape
    *tile, n = pages.shape
    pages = jnp.clip(pages, 0, num_pages - 1)
    stored = kv_pages.at[layer, pages].get(mode="promise_in_bounds")  # [*tile, n, 2, kvh, page_tokens, pool_dim]
    heads_outside = jnp.moveaxis(decode_bits(stored[..., :dim]), (-4, -3), (0, -4))
    return heads_outside.reshape(2, *tile, kvh, n * page_tokens, dim)


def gather_pages(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    pages: Int[Array, " n"],
    dim: int | None = None,
    dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "ctx kvh dim"], Float[Array, "ctx kvh dim"]]:
    """K and V of whole pages of one layer, `ctx = n * page_tokens`, in the order of `pages`.

    `dim` cuts the padding off (all of `pool_dim` if None); `dtype` converts (as stored if None, uint16 as bfloat16).
    Page indices outside the pool are clipped: mask what comes from them.
    """
    k, v = gather_heads(kv_pages, layer, pages, kv_pages.shape[-1] if dim is None else dim).swapaxes(1, 2)
    return (k, v) if dtype is None else (k.astype(dtype), v.astype(dtype))


def write_pages(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    pages: Int[Array, " n"],
    k: Float[Array, "ctx kvh dim"],
    v: Float[Array, "ctx kvh dim"],
) -> Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"]:
    """Writes whole pages, `ctx = n * page_tokens`, token `i` to slot `i % page_tokens` of `pages[i // page_tokens]`.

    A page index outside `[0, num_pages)` drops its page. Indices written must differ.
    """
    _, num_pages, _, kvh, page_tokens, pool_dim = kv_pages.shape
    values = jnp.stack([k, v]).reshape(2, -1, page_tokens, kvh, k.shape[-1]).transpose(1, 0, 3, 2, 4)
    values = _pad_dim(encode_bits(values, kv_pages.dtype), pool_dim)
    pages = jnp.where(pages < 0, num_pages, pages)  # .at wraps negative indices around
    return kv_pages.at[layer, pages].set(values, mode="drop")


def write_slots(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    layer: int | Int[Array, ""],
    pages: Int[Array, " n"],
    slots: Int[Array, " n"],
    k: Float[Array, "n kvh dim"],
    v: Float[Array, "n kvh dim"],
) -> Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"]:
    """Writes single tokens: token `i` to slot `slots[i]` of `pages[i]`; dropped where the page is outside the pool."""
    _, num_pages, _, kvh, _, pool_dim = kv_pages.shape
    values = _pad_dim(encode_bits(jnp.stack([k, v], axis=1), kv_pages.dtype), pool_dim)  # [n, 2, kvh, pool_dim]
    pages = jnp.where(pages < 0, num_pages, pages)
    # One index for each row of pool_dim: with a window over (2, kvh) the TPU compiler changes the pool's layout to
    # write, which copies all of it, twice.
    kv, head = jnp.arange(2)[:, None], jnp.arange(kvh)
    pages, slots = pages[:, None, None], slots[:, None, None]
    return kv_pages.at[layer, pages, kv, head, slots].set(values, mode="drop")


def read_all_layers(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"], pages: Int[Array, " n"]
) -> Shaped[Array, "n layers 2 kvh page_tokens pool_dim"]:
    """Whole pages across all layers, as stored (to migrate or copy them). Indices outside the pool are clipped."""
    pages = jnp.clip(pages, 0, kv_pages.shape[1] - 1)
    return kv_pages.at[jnp.arange(kv_pages.shape[0]), pages[:, None]].get(mode="promise_in_bounds")


def write_all_layers(
    kv_pages: Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"],
    pages: Int[Array, " n"],
    values: Shaped[Array, "n layers 2 kvh page_tokens pool_dim"],
) -> Shaped[Array, "layers pages 2 kvh page_tokens pool_dim"]:
    """Writes what `read_all_layers` gave; a page index outside the pool drops its page."""
    pages = jnp.where(pages < 0, kv_pages.shape[1], pages)
    # One index for each page of each layer: with a window over the layers the TPU compiler copies the pool.
    return kv_pages.at[jnp.arange(kv_pages.shape[0]), pages[:, None]].set(values, mode="drop")
