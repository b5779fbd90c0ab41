"""What is compiled for a model, a machine and a context length: the cluster, its programs, and how long they take.

What it is: arithmetic before and after the compiles. What it is not: the compiles (`compiled.py`), or what an engine
waits for (`serving/engine.py` lists it).
"""

from collections.abc import Iterable

import msgspec

from loong_jax.aot.targets import Target
from loong_jax.config import ClusterConfig, ConfigError, LadderConfig, LimitsConfig, ModelConfig, ladder_for
from loong_jax.kv_pool import pool_bytes
from loong_jax.types import Phase, Program


class Sizes(msgspec.Struct, frozen=True):
    """What an operator chooses. `context`: tokens whose KV the group holds beside the room for new tokens of a step;
    `prefill_tokens`: tokens of an instance in a prefill step, None: those of the default ladder that the default chunk
    takes; `decode_rows`: rows of a master."""

    dop: int
    tp: int
    context: int
    prefill_tokens: int | None = None
    decode_rows: int = 32
    page_tokens: int = 16

    def __post_init__(self) -> None:
        for field in ("dop", "tp", "context", "decode_rows", "page_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: must be positive, not {getattr(self, field)}")
        if self.context > 1 << 27:
            raise ConfigError(f"context: {self.context} tokens are more than {1 << 27}")


def cluster_for(target: Target, sizes: Sizes) -> ClusterConfig:
    """All of the machine's instances, each with the pages that its share of the context needs. Raises ConfigError."""
    num_instances = len(target.devices) // sizes.tp
    if num_instances < sizes.dop:
        raise ConfigError(
            f"dop: {sizes.dop} instances of tp {sizes.tp} need {sizes.dop * sizes.tp} devices, {target.name} has "
            f"{len(target.devices)}"
        )
    dops = tuple(sorted({*ladder_for(num_instances).dops, sizes.dop}))
    ladder, bucket = LadderConfig(), prefill_bucket(sizes)
    if bucket % sizes.page_tokens:
        raise ConfigError(f"prefill_tokens: {bucket} is no multiple of page_tokens {sizes.page_tokens}")
    # the context, an open page of each row, and the chunk that a prefill computes
    pages = -(-sizes.context // (sizes.dop * sizes.page_tokens)) + sizes.decode_rows + bucket // sizes.page_tokens
    return ClusterConfig(
        num_instances=num_instances,
        tp=sizes.tp,
        page_tokens=sizes.page_tokens,
        pages_per_instance=pages,
        ladder=msgspec.structs.replace(
            ladder,
            dops=dops,
            prefill_tokens=tuple(sorted({*ladder.prefill_tokens, bucket})),
            decode_rows=tuple(sorted({*ladder.decode_rows, sizes.decode_rows})),
        ),
    )


def prefill_bucket(sizes: Sizes) -> int:
    """Tokens of an instance in the prefill step that is compiled."""
    chunk = -(-min(sizes.context, LimitsConfig().chunk_tokens) // sizes.dop)
    ladder = LadderConfig().prefill_tokens
    return sizes.prefill_tokens or next((bucket for bucket in ladder if bucket >= chunk), ladder[-1])


def program_of(phase: Phase, cluster: ClusterConfig, sizes: Sizes) -> Program:
    """The step that stands for a phase. Raises ConfigError where a phase has no such group."""
    match phase:
        case Phase.PREFILL:
            return Program(phase, sizes.dop, prefill_bucket(sizes))
        case Phase.DECODE:
            return Program(phase, sizes.dop, sizes.decode_rows)
        case Phase.SCORE:
            return Program(phase, sizes.dop, cluster.ladder.score_tokens[0])
        case Phase.MIGRATE:
            if cluster.num_instances < 2:
                raise ConfigError("steps: a migration needs two instances")
            return Program(phase, 2, cluster.ladder.move_pages)
        case _:
            return Program(phase, 1, cluster.ladder.move_pages)


class Room(msgspec.Struct, frozen=True):
    """What one device has left, and the KV of how many tokens an instance could hold in all."""

    hbm_bytes: int
    needed_bytes: int
    free_bytes: int
    instance_tokens: int
    machine_tokens: int


def room(target: Target, model: ModelConfig, cluster: ClusterConfig, needed_bytes: int) -> Room:
    """`needed_bytes`: of a device, of the step that needs most."""
    hbm_bytes = int(target.hardware.hbm_bytes)
    free = hbm_bytes - needed_bytes
    token_bytes = (
        pool_bytes(model, cluster, target.platform) / cluster.tp / (cluster.pool_tokens / cluster.num_instances)
    )
    tokens = cluster.pages_per_instance * cluster.page_tokens + max(0, int(free / token_bytes))
    return Room(hbm_bytes, needed_bytes, free, tokens, tokens * cluster.num_instances)


class Readiness(msgspec.Struct, frozen=True):
    """Compiles of a cold start, one after the other, each device set by itself: until it serves, and in all."""

    needed_programs: int
    needed_s: float
    all_programs: int
    all_s: float


def readiness(
    needed: Iterable[tuple[Program, tuple[int, ...]]],
    others: Iterable[tuple[Program, tuple[int, ...]]],
    seconds: dict[Phase, float],
) -> Readiness:
    """`needed`, `others`: programs on device sets, as an engine lists them; `seconds`: what a compile of a phase took,
    whatever its sizes (a phase that was not compiled counts as the longest)."""
    longest = max(seconds.values(), default=0.0)
    needed, others = list(needed), list(others)
    took = lambda pairs: sum(seconds.get(program.phase, longest) for program, _ in pairs)
    return Readiness(len(needed), took(needed), len(needed) + len(others), took([*needed, *others]))
