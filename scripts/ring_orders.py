"""How XLA sends a ring's permutes over slices of TPUs, in JAX's order of devices and in that of instances: a table.

    python scripts/ring_orders.py [v5e:8x8 ...]

Compiles a bare ring (a permute and a product a step) over all devices, and over the first eight. It needs no TPU. What
it is not: the engine's steps, whose rings `tests/loong_jax/aot/test_compiled.py` looks at.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loong_jax.aot.collectives import collectives_of
from loong_jax.aot.hlo import Module
from loong_jax.aot.targets import target
from loong_jax.esp.ring_order import in_ring_order

SLICES = ("v5e:4x4", "v5e:4x8", "v5e:8x8", "v6e:8x8", "v5p:4x4x4", "tpu7x:4x4x4")
TOKENS, DIM = 2048, 512


def permutes(instances) -> str:
    """How the permutes of a ring over these instances are sent."""
    mesh = Mesh(np.array(instances), ("sp", "tp"))
    dop, tp = mesh.devices.shape
    ring = [(rank, (rank + 1) % dop) for rank in range(dop)]

    def program(x, w):
        def body(_, carry):
            block, total = carry
            return lax.ppermute(block, "sp", ring), total + jnp.tanh(block @ w)

        block, total = lax.fori_loop(0, dop - 1, body, (x, jnp.zeros_like(x)))
        return total + jnp.tanh(block @ w)

    mapped = jax.shard_map(program, mesh=mesh, in_specs=(P("sp", "tp"), P()), out_specs=P("sp", "tp"), check_vma=False)
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    arguments = place((dop * TOKENS, tp * DIM), P("sp", "tp")), place((DIM, DIM), P())
    try:
        text = jax.jit(mapped).lower(*arguments).compile().as_text()
    except Exception as error:  # jax raises what the compiler raises
        if "limited ICI routing" in str(error):
            return "refused"
        raise
    found = [one for one in collectives_of(Module(text), tp) if one.kind == "collective-permute"]
    return "sync" if any(one.kernels is None for one in found) else "async"


def main(slices: list[str]) -> None:
    print("| slice | devices | tp | JAX's order | along the cycle | eight devices of it |")
    print("|---|---|---|---|---|---|")
    for name in slices:
        devices = target(name).devices
        for tp in (1, 4):
            plain = [devices[first : first + tp] for first in range(0, len(devices), tp)]
            ours = in_ring_order(devices, tp)
            forms = permutes(plain), permutes(ours), permutes(ours[: 8 // tp])
            print(f"| {name} | {len(devices)} | {tp} | {' | '.join(forms)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SLICES))
