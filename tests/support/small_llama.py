"""A small Llama-like engine for start-up and dispatch measurements and for tests of the program ladder.

What it is: four unrolled layers, a prefill step (permute ring) and a decode step (all-gather q, all-to-all of partials)
over a donated pool, weights as one leaf a matrix, metadata packed into one int32 array: the shape of the real thing.
What it is not: correct attention. No page tables, no causal mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax.programs import StepFunction
from loong_jax.retarget import Device
from loong_jax.types import Phase, Program

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 4, 256, 8, 4, 32, 688, 1024
POOL_TOKENS, CONTEXT = 512, 128
META = 2 + CONTEXT  # of a token: id, slot, context slots


class SmallLlama(NamedTuple):
    """What `Programs` needs of an engine."""

    devices: Sequence[Device]  # one an instance

    def mesh_of(self, instances: tuple[int, ...]) -> Mesh:
        return Mesh(np.array([self.devices[i] for i in instances]).reshape(-1, 1), ("sp", "tp"))

    def build(self, program: Program) -> StepFunction:
        dop, rows = program.dop, program.bucket
        step = _prefill if program.phase is Phase.PREFILL else _decode
        specs = (P("tp"), P("sp"), P("sp"))
        function = jax.shard_map(step, in_specs=specs, out_specs=(P("sp"), P("sp")), check_vma=False)
        arguments = (
            {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in _weight_shapes().items()},
            jax.ShapeDtypeStruct((dop, LAYERS, POOL_TOKENS, 2, KV_HEADS, HEAD_DIM), jnp.float32),
            jax.ShapeDtypeStruct((dop, rows * META), jnp.int32),
        )
        return StepFunction(function, arguments, specs, donate=(1,))

    def inputs(self, program: Program, instances: tuple[int, ...]):
        """(weights, pool, numpy metadata) for a call."""
        mesh = self.mesh_of(instances)
        weights, pool, meta = self.build(program).arguments
        rng = np.random.default_rng(0)
        placed = {
            k: jax.device_put(rng.normal(size=s.shape, scale=0.02).astype(np.float32), NamedSharding(mesh, P("tp")))
            for k, s in weights.items()
        }
        zeros = jax.jit(lambda: jnp.zeros(pool.shape, pool.dtype), out_shardings=NamedSharding(mesh, P("sp")))
        return placed, zeros(), rng.integers(0, POOL_TOKENS, meta.shape).astype(np.int32)


def _weight_shapes() -> dict[str, tuple[int, ...]]:
    """Leading axis: tp."""
    shapes = {"embed": (1, VOCAB, DIM), "final_norm": (1, DIM)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.norm": (1, DIM),
            f"{layer}.q": (1, DIM, HEADS * HEAD_DIM),
            f"{layer}.k": (1, DIM, KV_HEADS * HEAD_DIM),
            f"{layer}.v": (1, DIM, KV_HEADS * HEAD_DIM),
            f"{layer}.o": (1, HEADS * HEAD_DIM, DIM),
            f"{layer}.gate": (1, DIM, HIDDEN),
            f"{layer}.up": (1, DIM, HIDDEN),
            f"{layer}.down": (1, HIDDEN, DIM),
        }
    return shapes


def _norm(x, weight):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def _step(weights, pool, meta, attend):
    weights, pool = {k: w[0] for k, w in weights.items()}, pool[0]
    meta = meta[0].reshape(-1, META)
    tokens, slots, context = meta[:, 0], meta[:, 1], meta[:, 2:]
    x = weights["embed"][tokens]
    for layer in range(LAYERS):
        w = {k.split(".")[1]: v for k, v in weights.items() if k.startswith(f"{layer}.")}
        h = _norm(x, w["norm"])
        q = (h @ w["q"]).reshape(-1, HEADS, HEAD_DIM)
        kv = jnp.stack([(h @ w["k"]).reshape(-1, KV_HEADS, HEAD_DIM), (h @ w["v"]).reshape(-1, KV_HEADS, HEAD_DIM)], 1)
        pool = pool.at[layer, slots].set(kv, mode="drop")
        x = x + attend(q, kv, pool[layer], context).reshape(-1, HEADS * HEAD_DIM) @ w["o"]
        h = _norm(x, w["norm"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    logits = _norm(x[-1:], weights["final_norm"]) @ weights["embed"].T
    token = jax.lax.all_gather(jnp.argmax(logits, -1).astype(jnp.int32), "sp", axis=0, tiled=True)
    return pool[None], token[None]


def _partial(scores, values, pattern):
    peak = scores.max(-1)
    p = jnp.exp(scores - peak[..., None])
    return jnp.einsum(pattern, p, values), peak, p.sum(-1)


def _merge(a, b):
    peak = jnp.maximum(a[1], b[1])
    left, right = jnp.exp(a[1] - peak), jnp.exp(b[1] - peak)
    return a[0] * left[..., None] + b[0] * right[..., None], peak, a[2] * left + b[2] * right


def _prefill(weights, pool, meta):
    def attend(q, kv, pages, context):
        dop = jax.lax.axis_size("sp")
        grouped = q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)

        def block(kv):
            scores = jnp.einsum("tkgd,skd->tkgs", grouped, kv[:, 0]) * HEAD_DIM**-0.5
            return _partial(scores, kv[:, 1], "tkgs,skd->tkgd")

        def hop(_, carry):
            state, kv = carry
            kv = jax.lax.ppermute(kv, "sp", [(r, (r + 1) % dop) for r in range(dop)])
            return _merge(state, block(kv)), kv

        (out, _, total), _ = jax.lax.fori_loop(0, dop - 1, hop, (block(kv), kv))
        return out / total[..., None]

    return _step(weights, pool, meta, attend)


def _decode(weights, pool, meta):
    def attend(q, kv, pages, context):
        dop = jax.lax.axis_size("sp")
        gathered = jax.lax.all_gather(q, "sp", axis=0, tiled=True).reshape(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        table = jax.lax.all_gather(context, "sp", axis=0, tiled=True)
        local = pages[table]
        scores = jnp.einsum("tkgd,tskd->tkgs", gathered, local[:, :, 0]) * HEAD_DIM**-0.5
        partial = _partial(scores, local[:, :, 1], "tkgs,tskd->tkgd")
        exchange = lambda a: jax.lax.all_to_all(a.reshape(dop, -1, *a.shape[1:]), "sp", 0, 0)
        outs, peaks, totals = map(exchange, partial)
        weight = jnp.exp(peaks - peaks.max(0))
        return (outs * weight[..., None]).sum(0) / (totals * weight).sum(0)[..., None]

    return _step(weights, pool, meta, attend)
