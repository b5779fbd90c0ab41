"""Named setups: from the words of a command line to a SimConfig, each policy on the machine that it is meant for.

A policy is written NAME, or NAME@INSTANCESxTP to run it on other instances of the same devices: static tensor
parallelism over eight devices is static_tp@1x8. The SLO stays that of the setup itself, as in the paper.
What it is not: the running of it (`driver.py`), or text for people (`serving/simulate.py`).
"""

from __future__ import annotations

import re
from functools import cache

import msgspec

from loong_jax.config import ConfigError
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.presets import cost_for, kv_capacity_tokens
from loong_jax.policy import POLICIES
from loong_jax.sim.bound import fluid_bound
from loong_jax.sim.config import SIM_LIMITS, SimConfig, sim_cluster
from loong_jax.sim.metrics import Slo
from loong_jax.sim.workloads import Workload
from loong_jax.types import ContextForm

PAPER_POOL_TOKENS = {1: 110_000, 2: 210_000, 4: 500_000, 8: 900_000}
"""KV of an instance of so many A800 with the 7B model, as LoongServe ran it (section 1)."""

CHUNK_TOKENS, WHOLE_PROMPTS = 8192, 1 << 20

FUSED_POLICIES = frozenset({"chunked", "chunked_2024", "fixed_sp", "replicas"})
"""Systems whose engines run a chunk of prefill and the decodes as one iteration."""

_SPEC = re.compile(r"(\w+)(?:@(\d+)x(\d+))?")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """`pool_tokens`: KV of one instance (0: as in the paper, or what the devices hold beside the weights).
    `chunk_tokens`: of one prefill step (0: what suits the policy: the elastic one bounds steps by their time).
    `targets`: requests name the SLO as what they want; policies that know nothing of targets do not look."""

    hardware: str = "A800"
    model: str = "lwm-7b"
    instances: int = 4
    tp: int = 2
    pool_tokens: int = 0
    page_tokens: int = 16
    chunk_tokens: int = 0
    max_running: int = 1024
    subsets: bool = False
    targets: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= SIM_LIMITS.max_running:
            raise ConfigError(f"max_running: must be between 1 and {SIM_LIMITS.max_running}")
        if self.chunk_tokens < 0:
            raise ConfigError("chunk_tokens: must not be negative")


class PolicySpec(msgspec.Struct, frozen=True):
    """A policy and where it runs; `text` is how it was written."""

    text: str
    name: str
    instances: int
    tp: int


def parse_policy(text: str, setup: Setup) -> PolicySpec:
    """Raises ConfigError."""
    match = _SPEC.fullmatch(text)
    if match is None or match[1] not in POLICIES:
        raise ConfigError(f"policy: {text!r} is none of {', '.join(POLICIES)}, or one of them with @INSTANCESxTP")
    return PolicySpec(text, match[1], int(match[2] or setup.instances), int(match[3] or setup.tp))


def make_config(setup: Setup, spec: PolicySpec, workload: Workload, *, record: bool = False) -> SimConfig:
    """Raises ConfigError."""
    cluster = sim_cluster(
        spec.instances, tp=spec.tp, pool_tokens=_pool_tokens(setup, spec.tp), page_tokens=setup.page_tokens
    )
    chunk_tokens = setup.chunk_tokens or (WHOLE_PROMPTS if spec.name == "elastic" else CHUNK_TOKENS)
    return SimConfig(
        times=_cost(setup.hardware, setup.model, spec.tp, spec.instances),
        workload=workload,
        cluster=cluster,
        limits=msgspec.structs.replace(SIM_LIMITS, chunk_tokens=chunk_tokens, max_running=setup.max_running),
        policy=spec.name,
        slo=slo_of(setup),
        targets=setup.targets,
        fused=spec.name in FUSED_POLICIES,
        subsets=setup.subsets,
        record=record,
    )


def slo_of(setup: Setup) -> Slo:
    """The paper's, from the time of a prompt by itself on all instances."""
    cost = _cost(setup.hardware, setup.model, setup.tp, setup.instances)

    @cache
    def alone_s(prompt_len: int) -> float:
        return cost.prefill_s(setup.instances, prompt_len, prompt_len * prompt_len / 2, 0, ContextForm.RING)

    return Slo(alone_s)


def bounds_of(setup: Setup, workload: Workload) -> tuple[float, float]:
    """Fluid bounds of these very requests on the setup: each on the DoP that serves it with the least work; and all on
    the whole group, which is the bound of goals and paper, and a little lower."""
    cost = _cost(setup.hardware, setup.model, setup.tp, setup.instances)
    lengths, whole = workload.prompt_lens, setup.instances
    return fluid_bound(lengths, cost, whole, range(1, whole + 1)), fluid_bound(lengths, cost, whole, (whole,))


def _pool_tokens(setup: Setup, tp: int) -> int:
    if setup.pool_tokens:
        return setup.pool_tokens * tp // setup.tp
    if (setup.hardware, setup.model) == ("A800", "lwm-7b") and tp in PAPER_POOL_TOKENS:
        return PAPER_POOL_TOKENS[tp]
    try:
        return kv_capacity_tokens(setup.hardware, setup.model, tp)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _cost(hardware: str, model: str, tp: int, instances: int) -> FittedCost:
    try:
        return cost_for(hardware, model, tp, instances)
    except ValueError as error:  # names the field
        raise ConfigError(str(error)) from error
