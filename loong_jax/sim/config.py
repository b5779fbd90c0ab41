"""What a simulation is made of, and what it tells: frozen records.

What it is not: the driver (`driver.py`), or the meaning of a workload's name (`workloads.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from loong_jax.config import ClusterConfig, ConfigError, LadderConfig, LimitsConfig, ladder_for
from loong_jax.cost import CostModel
from loong_jax.manager import Policy
from loong_jax.sim.faults import Faults
from loong_jax.sim.metrics import Slo, Summary
from loong_jax.sim.trace import Span
from loong_jax.sim.workloads import Workload

PolicyMaker = Callable[[ClusterConfig, LimitsConfig], Policy]

SIM_LADDER = LadderConfig(
    prefill_tokens=(512, 8192, 131072), decode_rows=(1, 8, 64, 512), move_pages=1024, score_tokens=()
)
"""Buckets that bind nobody: a simulated step costs what its real tokens cost, whatever its bucket."""

SIM_LIMITS = LimitsConfig(max_waiting=1_000_000, max_running=1024)
"""Nobody is refused: a system that cannot keep up shows it by its latencies."""


class StepTimes(Protocol):
    """The truth about a simulated machine. Any CostModel is one."""

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form) -> float: ...
    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float: ...
    def migrate_s(self, tokens: int) -> float: ...


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`times`: the truth about durations; `cost`: what the policy believes (None: the truth). `fused`: a prefill and a
    decode that wait on the same instances run as one iteration. `tick_us`, `prepare_us`: as the live loop wakes up, and
    as long as a program that was asked for takes. `drain_s`: the run ends so long after the last arrival, and what is
    not finished then counts as unfinished. `targets`: requests name the SLO as what they want.
    `subsets`: programs are READY on every subset of the instances, else on arcs of neighbours as in the live engine.
    `record`: keep a Span for each step. `check_every`: all invariants after each so many events (0: only those that
    every event checks itself). `hash_commands`: the event log's hash covers the bytes of all commands. `prompt`:
    (request, length) to its token ids; zeros by default, as nobody reads them."""

    times: StepTimes
    workload: Workload
    cluster: ClusterConfig
    policy: str | PolicyMaker = "elastic"
    cost: CostModel | None = None
    limits: LimitsConfig = SIM_LIMITS
    slo: Slo | None = None
    targets: bool = False
    fused: bool = False
    subsets: bool = False
    tick_us: int = 100_000
    prepare_us: int = 100_000
    drain_s: float = 36_000.0
    faults: Faults | None = None
    hash_commands: bool = False
    prompt: Callable[[int, int], bytes] | None = None
    record: bool = False
    check_every: int = 0
    progress: Callable[[int, int], None] | None = None
    """Told (requests ended, requests in all) now and then."""

    def __post_init__(self) -> None:
        for field in ("tick_us", "drain_s"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field}: must be positive")
        for field in ("prepare_us", "check_every"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field}: must not be negative")


class Outcome(msgspec.Struct, gc=False):
    """One request. Times in microseconds of the virtual clock; -1: not yet. `status`: "finished", "unfinished",
    "aborted", "rejected" or "failed"."""

    request: int
    prompt_len: int
    output_len: int
    arrived_us: int
    first_us: int = -1
    last_us: int = -1
    emitted: int = 0
    status: str = "unfinished"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`event_log_hash`: of all events with their times; equal seeds give equal bytes. `faults`: how often each kind
    happened. `cpu_s`: spent on the whole run, manager, policy and simulator."""

    outcomes: list[Outcome]
    summary: Summary
    spans: list[Span]
    event_log_hash: str
    num_events: int
    num_steps: int
    faults: dict[str, int]
    sim_s: float
    cpu_s: float


def sim_cluster(num_instances: int, *, pool_tokens: int, tp: int = 1, page_tokens: int = 16) -> ClusterConfig:
    """A simulated cluster: `pool_tokens` of KV on each instance."""
    return ClusterConfig(
        num_instances=num_instances,
        tp=tp,
        page_tokens=page_tokens,
        pages_per_instance=max(1, pool_tokens // page_tokens),
        slots=SIM_LIMITS.max_running,
        ladder=_ladder(num_instances),
    )


def _ladder(num_instances: int) -> LadderConfig:
    """The usual DoPs, and those of all instances but one or a quarter where the ladder has room for them: the groups of
    a long prompt that leaves some to the others."""
    ladder = ladder_for(num_instances, SIM_LADDER)
    dops = tuple(sorted({*ladder.dops, max(1, num_instances - 1), num_instances - num_instances // 4}))
    try:
        return msgspec.structs.replace(ladder, dops=dops)
    except ConfigError:
        return ladder
