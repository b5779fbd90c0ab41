"""Pages in and out of a pool: what is written is read, what must be dropped is, and the pool never moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import storage
from pallas_kernels.flash_partial import flash_partial
from pallas_kernels.paged_partial import paged_partial

LAYERS, PAGES, KVH, PAGE_TOKENS, POOL_DIM, DIM = 4, 512, 2, 16, 64, 48
STORAGE = [jnp.float32, jnp.uint16]
"""bfloat16 itself is for TPU and GPU: XLA's CPU backend in jax 0.10 converts such a pool as a whole."""


def make_pool(dtype) -> jax.Array:
    shape = (LAYERS, PAGES, 2, KVH, PAGE_TOKENS, POOL_DIM)
    return jax.jit(lambda: jnp.zeros(shape, dtype))()


def kv(num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values that bfloat16 holds exactly."""
    values = np.random.default_rng(seed).integers(-99, 99, (2, num_tokens, KVH, DIM)).astype(np.float32)
    return values[0], values[1]


def as_float(pool: jax.Array) -> np.ndarray:
    return np.asarray(storage.decode_bits(pool).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [*STORAGE, jnp.bfloat16])
def test_pages_are_read_as_written_and_others_untouched(dtype):
    k, v = kv(5 * PAGE_TOKENS)
    pages = jnp.array([7, PAGES, 3, -1, 100])  # the second and fourth are dropped
    pool = storage.write_pages(make_pool(dtype), jnp.int32(2), pages, k, v)
    got_k, got_v = storage.gather_pages(pool, 2, pages[::2], DIM, jnp.float32)
    kept = np.concatenate([np.arange(PAGE_TOKENS) + PAGE_TOKENS * i for i in (0, 2, 4)])
    np.testing.assert_array_equal(got_k, k[kept])
    np.testing.assert_array_equal(got_v, v[kept])
    rest = as_float(pool).copy()
    rest[2, [7, 3, 100], ..., :DIM] = 0
    assert not rest.any()


@pytest.mark.parametrize("dtype", [*STORAGE, jnp.bfloat16])
def test_slots_are_read_as_written_and_others_untouched(dtype):
    k, v = kv(4)
    pages, slots = jnp.array([5, PAGES + 3, 5, -1]), jnp.array([0, 1, 15, 2])
    pool = storage.write_slots(make_pool(dtype), 1, pages, slots, k, v)
    got_k, got_v = storage.gather_pages(pool, 1, jnp.array([5]), DIM, jnp.float32)
    np.testing.assert_array_equal(got_k[np.array([0, 15])], k[[0, 2]])
    np.testing.assert_array_equal(got_v[np.array([0, 15])], v[[0, 2]])
    rest = as_float(pool).copy()
    rest[1, 5, :, :, [0, 15], :DIM] = 0
    assert not rest.any()


@pytest.mark.parametrize("dtype", STORAGE)
def test_pages_move_across_all_layers(dtype):
    pool = make_pool(dtype)
    for layer in range(LAYERS):
        pool = storage.write_pages(pool, layer, jnp.array([4, 9]), *kv(2 * PAGE_TOKENS, layer))
    moved = storage.write_all_layers(pool, jnp.array([0, PAGES]), storage.read_all_layers(pool, jnp.array([9, 4])))
    for layer in range(LAYERS):
        got = storage.gather_pages(moved, layer, jnp.array([0, 4, 9]), DIM, jnp.float32)
        for values, written in zip(got, kv(2 * PAGE_TOKENS, layer), strict=True):
            np.testing.assert_array_equal(values, np.concatenate([written[PAGE_TOKENS:], written]))


def test_gather_defaults_to_the_stored_width_and_float_type():
    k, _ = storage.gather_pages(make_pool(jnp.uint16), 0, jnp.array([1, 2]))
    assert k.shape == (2 * PAGE_TOKENS, KVH, POOL_DIM)
    assert k.dtype == jnp.bfloat16


# ---------------------------------------------------------------------------------------------------------------
# In place


def write_prompt(pool, trips):
    pages = jnp.arange(8)
    k, v = kv(8 * PAGE_TOKENS)
    return lax.scan(lambda c, layer: (storage.write_pages(c, layer, pages, k, v), None), pool, jnp.arange(LAYERS))[0]


def move(pool, trips):
    pages = jnp.arange(4)
    return storage.write_all_layers(pool, pages + 1, storage.read_all_layers(pool, pages))


def decode(pool, trips):
    """Writes new tokens, then reads the pool, layer by layer (the other order is a copy, see `storage`)."""
    rows = 8
    entries = jnp.stack([jnp.arange(64), 16 * jnp.arange(64), jnp.full(64, 16)], axis=1)
    row_len = jnp.arange(rows) % 3 + trips
    pages, slots = jnp.arange(rows), jnp.arange(rows)

    def step(carry, layer):
        pool, hidden = carry
        k = hidden[:, :KVH]
        pool = storage.write_slots(pool, layer, pages, slots, k, k)
        part = paged_partial(
            hidden[:, None], jnp.full((rows, 1), 999), pool, layer, entries, 8 * jnp.arange(rows), row_len, scale=0.1
        )
        return (pool, hidden + part.out[:, 0]), None

    return lax.scan(step, (pool, jnp.ones((rows, 2 * KVH, DIM))), jnp.arange(LAYERS))[0][0]


def ring(pool, trips):
    """A loop of data-dependent length inside the layer loop, whose body gathers pages, attends and writes pages."""
    pos, req, pages = jnp.arange(64), jnp.zeros(64, jnp.int32), jnp.arange(4)

    def layer_step(carry, layer):
        def tile(i, carry):
            pool, total = carry
            k, v = storage.gather_pages(pool, layer, pages + i, DIM, jnp.float32)
            part = flash_partial(jnp.ones((64, 4, DIM)), k, v, req, pos, req, pos, scale=0.1)
            return storage.write_pages(pool, layer, pages + i + 1, k + 1, v + 1), total + part.out

        return lax.fori_loop(0, trips, tile, carry), None

    return lax.scan(layer_step, (pool, jnp.zeros((64, 4, DIM))), jnp.arange(LAYERS))[0][0]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("program", [write_prompt, move, decode, ring], ids=lambda f: f.__name__)
def test_the_pool_is_written_in_place(program, dtype):
    pool = make_pool(dtype)
    pool_bytes, address = pool.nbytes, pool.unsafe_buffer_pointer()
    compiled = jax.jit(program, donate_argnums=0).lower(pool, jnp.int32(3)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4
    for _ in range(3):
        pool = compiled(pool, jnp.int32(3))
        assert pool.unsafe_buffer_pointer() == address
