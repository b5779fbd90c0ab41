"""Causal attention of a whole prompt, bfloat16, D = 128, heads of an 8B model, beside cuDNN and JAX's own kernel.

All run in turns in one process, on the same arrays; times are the best of a few calls. On a CPU the blockwise path
stands in, beside XLA's attention.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench_kernels import best_s
from on_gpu.figures import Figures, Share

from pallas_kernels import flash_partial as flash

HEADS, KVH, DIM = 32, 8, 128
TOKENS = {"32K": 1 << 15, "64K": 1 << 16, "128K": 1 << 17}
TINY = {"256": 256}
CALLS = 5
BESIDE_CUDNN, BESIDE_JAX, TFLOPS = 0.9, 1.0, 600.0
SAME = 2e-2
"""Between two kernels in bfloat16, relative to the largest value."""


def names(tiny: bool) -> list[str]:
    return list(TINY if tiny else TOKENS)


def measure(name: str, tiny: bool) -> Figures:
    tok = (TINY if tiny else TOKENS)[name]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (tok, heads, DIM), jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KVH, KVH), strict=True)
    )
    runs, notes = {}, []
    for who, contender in (own_forms(q, k, v) | peers(q, k, v)).items():
        try:
            compiled = jax.jit(contender.function).lower(*contender.arrays).compile()
        except Exception as error:  # a peer or a form that this jax or device does not have; others go on
            notes.append(f"{who}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            runs[who] = functools.partial(compiled, *contender.arrays)
    if not any(who.startswith("loong") for who in runs):
        raise RuntimeError("; ".join(notes))
    notes += differences({who: run() for who, run in runs.items()})
    times = best_s(CALLS, list(runs.values()))
    return figures(dict(zip(runs, times, strict=True)), tok, notes)


class Contender(NamedTuple):
    """`function(*arrays)` is `[tok, head, dim]`."""

    function: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]


def own_forms(q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, Contender]:
    """The forms of our kernel, the default one first."""
    run = flash.IMPLEMENTATIONS["blockwise" if jax.default_backend() == "cpu" else "gpu"]
    request, position = jnp.zeros(len(q), jnp.int32), jnp.arange(len(q), dtype=jnp.int32)
    arrays = (q, k, v, request, position, request, position)

    def form(**sizes) -> Contender:
        return Contender(lambda *arrays: run(*arrays, scale=DIM**-0.5, **sizes).out.astype(q.dtype), arrays)

    if jax.default_backend() == "cpu":
        return {"loong": form()}
    return {"loong": form(), "loong_in_registers": form(weights_in_registers=True)}


def peers(q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, Contender]:
    """JAX's own op has float16 written into it, and no scale: it gets the same values so."""
    implementation = "xla" if jax.default_backend() == "cpu" else "cudnn"

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=DIM**-0.5, is_causal=True, implementation=implementation)[0]

    def own_op_of_jax(q, k, v):
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
        return jnp.asarray(attention_mgpu.attention(q, k, v, config))[0]

    q, k, v = (a[None] for a in (q, k, v))
    found = {implementation: Contender(dense, (q, k, v))}
    if implementation == "cudnn":
        halves = ((q * DIM**-0.5).astype(jnp.float16), k.astype(jnp.float16), v.astype(jnp.float16))
        found["jax_op"] = Contender(own_op_of_jax, halves)
    return found


def differences(outs: dict[str, jax.Array]) -> list[str]:
    """What the others say that differs from the first, in words."""
    (_, first), *others = outs.items()
    first = first.astype(jnp.float32)
    found = {who: float(jnp.abs(out - first).max() / jnp.abs(first).max()) for who, out in others}
    return [f"{who} differs by {error:.3g}" for who, error in found.items() if not error <= SAME]


def figures(seconds: dict[str, float], tok: int, notes: list[str]) -> Figures:
    """Every form of ours beside every peer: what is asked is asked of the best form."""
    flop = 2 * tok**2 * HEADS * DIM  # half of the pairs
    numbers = {f"{who}_ms": time_s * 1e3 for who, time_s in seconds.items()}
    numbers |= {f"{who}_tflops": flop / time_s / 1e12 for who, time_s in seconds.items()}
    own_s = min(time_s for who, time_s in seconds.items() if who.startswith("loong"))
    asked = {"cudnn": ("speed over cuDNN's", BESIDE_CUDNN), "jax_op": ("speed over JAX's own op's", BESIDE_JAX)}
    shares = [Share(words, seconds[who] / own_s, least) for who, (words, least) in asked.items() if who in seconds]
    if "xla" not in seconds:
        shares.append(Share(f"of {TFLOPS:g} TFLOP/s, an aim:", flop / own_s / 1e12 / TFLOPS, 1.0))
    return Figures(numbers, tuple(shares), tuple(notes))
