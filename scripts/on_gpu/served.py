"""The engine on one instance, in the shape of an 8B model with random weights: prefill of 128K, decode by batch.

Manager, elastic policy and executor as they serve, without a server (`engine_workers/loong_worker.py`). On a CPU a tiny
model stands in.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
from engine_workers.loong_worker import Engine
from on_gpu.figures import Figures

from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.cost.presets import MODELS
from loong_jax.cost.roofline import shape_of
from loong_jax.esp.groups import Devices
from loong_jax.esp.steps import StepBuilder
from loong_jax.model.decoder import param_structs

MODEL = MODELS["llama-3.1-8b"]
TINY_MODEL = msgspec.structs.replace(
    MODEL, vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32
)
HEADROOM_BYTES = 8 << 30
"""Of the device: temporaries of steps, and what the runtime keeps."""


class Case(NamedTuple):
    """`batch` 0: a prompt of `tokens`; else rows of `context` tokens that decode `tokens` more each."""

    name: str
    batch: int
    context: int
    tokens: int

    @property
    def held_tokens(self) -> int:
        return self.tokens if self.batch == 0 else self.batch * (self.context + 4 + 2 * self.tokens + 16)


CASES = (
    Case("prefill 128K", 0, 0, 1 << 17),
    Case("decode 1 x 128K", 1, 1 << 17, 64),
    Case("decode 32 x 8K", 32, 1 << 13, 64),
    Case("decode 128 x 4K", 128, 1 << 12, 32),
)
TINY = (Case("prefill 96", 0, 0, 96), Case("decode 2 x 32", 2, 32, 4))


def names(tiny: bool) -> list[str]:
    return [case.name for case in (TINY if tiny else CASES)]


def measure(name: str, tiny: bool, kernel_sizes: str = "") -> Figures:
    """Raises MemoryError where the device does not hold the batch."""
    case = next(case for case in (TINY if tiny else CASES) if case.name == name)
    engine, pool_tokens = engine_of(tiny, kernel_sizes)
    if case.held_tokens > pool_tokens:
        raise MemoryError(f"{case.held_tokens} tokens of KV are more than the {pool_tokens} that this device holds")
    if case.batch == 0:
        engine.prefill_s(case.tokens // 8)  # not counted
        taken_s = engine.prefill_s(case.tokens)
        flop = prompt_flop(TINY_MODEL if tiny else MODEL, case.tokens)
        numbers = {"seconds": taken_s, "tokens_per_s": case.tokens / taken_s, "model_tflops": flop / taken_s / 1e12}
        return Figures(numbers)
    taken_s = engine.decode_s(case.batch, case.context, case.tokens)
    step_ms = taken_s / case.tokens * 1e3
    return Figures({"tokens_per_s": case.batch * case.tokens / taken_s, "step_ms": step_ms})


@functools.cache
def engine_of(tiny: bool, kernel_sizes: str) -> tuple[Engine, int]:
    """Compiled, with the pool that the largest case needs, or as much of it as fits."""
    model = TINY_MODEL if tiny else MODEL
    needed = max(case.held_tokens for case in (TINY if tiny else CASES))
    held = min(needed, room_tokens(model))
    ladder = LadderConfig(
        dops=(1,),
        prefill_tokens=(128,) if tiny else (512, 8192),
        decode_rows=(2,) if tiny else (1, 32, 128),
        score_tokens=(),
    )
    cluster = ClusterConfig(
        num_instances=1, pages_per_instance=-(-held // 16), slots=256, ladder=ladder,
        kernel_sizes=Path(kernel_sizes).read_text() if kernel_sizes else "",
    )  # fmt: skip
    return Engine(model, cluster, random_weights), held


def room_tokens(model: ModelConfig) -> int:
    """Tokens of KV beside the weights; on devices that do not say what they have, any number."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return 1 << 30
    shape = shape_of(model)
    weights = shape.weight_bytes + shape.head_params * shape.value_bytes  # of embedding, layers, head
    return int((stats["bytes_limit"] - weights - HEADROOM_BYTES) / shape.kv_token_bytes)


def random_weights(builder: StepBuilder, devices: Devices) -> list[list]:
    """Made on the device: `[instance][rank]`, a tree of `[1, *local]`."""
    structs = param_structs(builder.model, 1, stacked=builder.stacked)
    leaves, tree = jax.tree.flatten(structs)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def on(device):
        draw = lambda key, leaf: jax.random.uniform(key, leaf.shape, leaf.dtype, -0.02, 0.02)
        place = jax.sharding.SingleDeviceSharding(device)
        fill = jax.jit(draw, static_argnums=1, out_shardings=place)
        return jax.tree.unflatten(tree, [fill(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])

    return [[on(device) for device in instance] for instance in devices.by_instance]


def prompt_flop(model: ModelConfig, tokens: int) -> float:
    """Of a causal prompt: twice the weights that each token meets, and both products of attention."""
    attention = 2 * tokens**2 * model.num_layers * model.num_heads * model.head_dim
    return 2 * shape_of(model).linear_params * tokens + attention
