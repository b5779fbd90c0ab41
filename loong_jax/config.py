"""Frozen configurations: model, cluster, ladder, limits. Relations are checked at construction.

What it is not: command-line parsing (`serving/cli.py`) or reading of checkpoints (`loong_jax/model/checkpoint.py`).
No JAX types: dtypes are strings.
"""

from __future__ import annotations

import msgspec

from loong_jax.types import Phase, Program


class ConfigError(ValueError):
    """A configuration that cannot be served. The message names the field."""


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: {message}")


ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotary embedding, `kind` one of ROPE_KINDS; what a field means to which kind stands beside it.

    The frequencies of "dynamic" and "longrope" depend on a request's length (`by_length`), and on nothing else, so that
    cached keys stay right: the length is fixed when the request arrives."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0  # linear, dynamic, yarn, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 8192  # dynamic, yarn, llama3, longrope
    attention_factor: float = 1.0  # yarn, longrope: scales cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope: one for each rotated pair, up to original_max_position
    long_factor: tuple[float, ...] = ()  # longrope: beyond it

    def __post_init__(self) -> None:
        _require(self.kind in ROPE_KINDS, "rope.kind", f"{self.kind!r} is none of {', '.join(ROPE_KINDS)}")
        _require(self.theta > 1, "rope.theta", "must exceed 1")
        _require(self.factor > 0, "rope.factor", "must be positive")
        _require(self.original_max_position >= 1, "rope.original_max_position", "must be positive")

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length a request is admitted with."""
        return self.kind in ("dynamic", "longrope")


class ModelConfig(msgspec.Struct, frozen=True):
    """A dense decoder. `dtype`: "float32" or "bfloat16". What a whole family has in common is in
    `model/families.py`; here is what differs between its checkpoints.

    `windows`: of each layer, how many positions a query sees, its own included (0: all); () where no layer has a
    window. `window_rope`: rotary embedding of the layers with a window, where it is another one. `query_scalar`: scores
    are scaled by its -0.5th power (None: head_dim)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    qkv_bias: bool = False
    o_bias: bool = False
    windows: tuple[int, ...] = ()
    window_rope: RopeConfig | None = None
    query_scalar: int | None = None
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _require(getattr(self, field) >= 1, field, "must be positive")
        _require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", "must divide num_heads")
        _require(self.head_dim >= 2 and self.head_dim % 2 == 0, "head_dim", "must be even")
        _require(self.dtype in ("float32", "bfloat16"), "dtype", f"{self.dtype!r} is not float32 or bfloat16")
        _require(len(self.windows) in (0, self.num_layers), "windows", "must be one for each layer")
        _require(min(self.windows, default=0) >= 0, "windows", "must not be negative")
        for field in ("query_scalar", "attn_soft_cap", "logit_soft_cap"):
            value = getattr(self, field)
            _require(value is None or value > 0, field, "must be positive")
        for rope in (self.rope, self.window_rope or self.rope):
            _require(rope.kind != "dynamic" or self.head_dim > 2, "head_dim", "must exceed 2 for dynamic rope")
            for factors in (rope.short_factor, rope.long_factor) if rope.kind == "longrope" else ():
                right = len(factors) == self.head_dim // 2 and min(factors) > 0
                _require(right, "rope factors", f"must be {self.head_dim // 2} positive numbers")

    @property
    def attention_scale(self) -> float:
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def kv_window(self) -> int:
        """How many positions back any layer looks, its own included: KV before is never read again. 0: no bound."""
        return max(2, *self.windows) if self.windows and min(self.windows) > 0 else 0

    @property
    def rope_by_length(self) -> bool:
        return self.rope.by_length or (self.window_rope is not None and self.window_rope.by_length)

    @property
    def context_length(self) -> int:
        """Positions the model is made for: `max_position`, stretched where that tells the length before scaling (with
        a `window_rope` it tells the length after it)."""
        rope = self.rope
        if rope.kind in ("linear", "dynamic") and self.window_rope is None:
            return max(self.max_position, int(self.max_position * rope.factor))
        if rope.kind == "yarn":
            return max(self.max_position, int(rope.original_max_position * rope.factor))
        return self.max_position


class LadderConfig(msgspec.Struct, frozen=True):
    """The program ladder (DESIGN 5). Everything else about a step is data.

    `prefill_tokens`: tokens per instance; `decode_rows`: rows per master; `prefill_rows`: requests a prefill batch may
    hold; `move_pages`: pages a migrate or copy program takes at once; `score_tokens`: tokens per instance of a prefill
    that gives log-probabilities of the prompt, which is refused where there is none.
    """

    dops: tuple[int, ...] = (1, 2, 3, 4, 8)
    prefill_tokens: tuple[int, ...] = (128, 512, 2048, 8192)
    decode_rows: tuple[int, ...] = (1, 8, 32, 128)
    prefill_rows: int = 32
    move_pages: int = 64
    score_tokens: tuple[int, ...] = (512,)

    def __post_init__(self) -> None:
        for field in ("dops", "prefill_tokens", "decode_rows"):
            values = getattr(self, field)
            _require(len(values) > 0 and list(values) == sorted(set(values)), field, "must be ascending and not empty")
            _require(values[0] >= 1, field, "must be positive")
        _require(list(self.score_tokens) == sorted(set(self.score_tokens)), "score_tokens", "must be ascending")
        _require(all(tokens >= 1 for tokens in self.score_tokens), "score_tokens", "must be positive")
        _require(self.dops[0] == 1, "dops", "must contain 1: every request must be servable on one instance")
        _require(self.num_programs <= 64, "ladder", f"holds {self.num_programs} programs; at most 64")

    @property
    def num_programs(self) -> int:
        return len(self.programs())

    def programs(self) -> tuple[Program, ...]:
        """All programs, the most needed first (DoP 1 and the largest)."""
        out: list[Program] = []
        for dop in sorted(self.dops, key=lambda d: (d not in (1, self.dops[-1]), d)):
            out += [Program(Phase.PREFILL, dop, b) for b in self.prefill_tokens]
            out += [Program(Phase.DECODE, dop, b) for b in self.decode_rows]
            out += [Program(Phase.SCORE, dop, b) for b in self.score_tokens]
        out.append(Program(Phase.COPY, 1, self.move_pages))
        if 2 in self.dops:
            out.append(Program(Phase.MIGRATE, 2, self.move_pages))
        return tuple(out)

    def buckets(self, phase: Phase) -> tuple[int, ...]:
        """Sizes of the programs of a step phase, ascending."""
        match phase:
            case Phase.PREFILL:
                return self.prefill_tokens
            case Phase.SCORE:
                return self.score_tokens
            case Phase.DECODE:
                return self.decode_rows
            case _:
                return (self.move_pages,)


class ClusterConfig(msgspec.Struct, frozen=True):
    """Instances and their pools.

    `pages_per_instance` pages of `page_tokens` tokens each; `ring_tokens`: size of a context tile in the ring;
    `query_tile_tokens`: q tokens per instance exchanged at once in gather-q; `table_entries`: page-table entries an
    instance can hold (shared pages have one entry per request); `slots`: requests alive at once; `adjust_tokens`: most
    tokens of one request whose logits may be biased, banned, or penalised for their number; `max_top`: most likeliest
    tokens reported for a position; `kv_window`: that of the model, where every layer has one: KV further back is
    dropped (0: all is kept); `attention`: "pallas": kernels where the platform has them; "reference": pure JAX alone;
    `kernel_sizes`: the text of a file of `scripts/tune_kernels.py` (empty: what heuristics choose).
    """

    num_instances: int
    tp: int = 1
    page_tokens: int = 16
    pages_per_instance: int = 1024
    ring_tokens: int = 512
    query_tile_tokens: int = 128
    slots: int = 1024
    ladder: LadderConfig = LadderConfig()
    adjust_tokens: int = 8192
    max_top: int = 20
    kv_window: int = 0
    attention: str = "pallas"
    kernel_sizes: str = ""

    def __post_init__(self) -> None:
        _require(self.num_instances >= 1, "num_instances", "must be positive")
        _require(self.tp >= 1, "tp", "must be positive")
        _require(self.page_tokens >= 1, "page_tokens", "must be positive")
        _require(self.pages_per_instance >= 1, "pages_per_instance", "must be positive")
        _require(self.ring_tokens % self.page_tokens == 0, "ring_tokens", "must be a multiple of page_tokens")
        _require(
            self.query_tile_tokens % self.page_tokens == 0, "query_tile_tokens", "must be a multiple of page_tokens"
        )
        for field in ("prefill_tokens", "score_tokens"):
            for bucket in getattr(self.ladder, field):
                _require(bucket % self.page_tokens == 0, field, f"{bucket} is no multiple of page_tokens")
        _require(self.adjust_tokens >= 1, "adjust_tokens", "must be positive")
        _require(self.max_top >= 0, "max_top", "must not be negative")
        _require(max(self.ladder.dops) <= self.num_instances, "dops", "exceed num_instances")
        # A request keeps its newest page, so that whoever loses the step that made it is told of a loss.
        _require(self.kv_window == 0 or self.kv_window >= 2, "kv_window", "must be 0 or at least 2")
        _require(self.attention in ("pallas", "reference"), "attention", "must be 'pallas' or 'reference'")

    @property
    def table_entries(self) -> int:
        return 2 * self.pages_per_instance + 2 * self.slots

    def kv_needed(self, num_tokens: int) -> int:
        """Positions that a request must be able to hold to reach `num_tokens` of KV: a window with partial pages at its
        ends, a page being computed or decoded into, and one that is dropped a page late."""
        return min(num_tokens, self.kv_window + 4 * self.page_tokens) if self.kv_window else num_tokens

    @property
    def pool_tokens(self) -> int:
        return self.num_instances * self.pages_per_instance * self.page_tokens


class LimitsConfig(msgspec.Struct, frozen=True):
    """Bounds of the manager. Times in microseconds."""

    max_waiting: int = 1024
    max_running: int = 256
    chunk_tokens: int = 8192  # new tokens of one prefill step over the whole group
    decode_headroom_pages: int = 2  # free pages a retention target keeps per request for decode
    chunk_us: int = 1_000_000  # predicted time of one prefill step, which whoever arrives meanwhile waits for
    batch_candidates: int = 16  # requests that batching looks at together
    token_us: int = 50_000  # time between tokens of a request that names none, when prefill shares its instances
    patience_us: int = 15_000_000  # to the first token of a request that names none; longer for those that take long
    hold_us: int = 2_000_000  # a reservation ends within this time
    max_step_failures: int = 8  # in a row, of one request's steps; then it ends with an error


def ladder_for(num_instances: int, ladder: LadderConfig = LadderConfig()) -> LadderConfig:
    """The default ladder cut to what `num_instances` can form, with the largest group always in it."""
    dops = tuple(sorted({d for d in ladder.dops if d <= num_instances} | {num_instances}))
    return msgspec.structs.replace(ladder, dops=dops)
