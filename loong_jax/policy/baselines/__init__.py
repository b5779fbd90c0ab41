"""The systems that Loong is compared with, as policies (LoongServe section 7.3).

Each has a form of 2024, as in the systems the paper compared with, and one of today. What of 2024 is no decision (eager
launches, host work between iterations, transfers that wait for compute) belongs to the hardware or cost model it is
simulated with, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.baselines.disaggregated import Disaggregated
from loong_jax.policy.baselines.lane import Rules
from loong_jax.policy.baselines.lanes import LanePolicy, each_alone, least_work, round_robin
from loong_jax.policy.baselines.loongserve import LoongServe
from loong_jax.policy.baselines.loongserve_dispatch import PAPER, Constants
from loong_jax.types import Plan, View


class Baseline(Protocol):
    def plan(self, view: View, cost: CostModel) -> Plan: ...


def static_tp(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """One group of everything (for tensor parallelism, a cluster of one instance); continuous batching in order of
    arrival, whole prompts before any decode, the newest evicted by recomputation; one step ahead of the host."""
    return LanePolicy(cluster, limits, Rules())


def static_tp_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """vLLM 0.3: the host waits for each step, and 1% of the blocks stay free at admission."""
    return LanePolicy(cluster, limits, Rules(depth=1, watermark=0.01))


def chunked(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """Sarathi-Serve and vLLM today: `chunk_tokens` in each iteration, decodes first, then prompts in order of arrival.
    Decode and chunk are queued together: one iteration on hardware that fuses them, else one after the other."""
    return LanePolicy(cluster, limits, Rules(budget=limits.chunk_tokens))


def chunked_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """SplitFuse of LightLLM: the host waits for each step, and admission reserves all of `max_tokens`."""
    return LanePolicy(cluster, limits, Rules(budget=limits.chunk_tokens, depth=1, reserves_output=True))


def fixed_sp(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """All instances one group of sequence parallelism, chunked prefill, KV even, every instance a master: what
    `chunked` is on several instances."""
    return LanePolicy(cluster, limits, Rules(budget=limits.chunk_tokens))


def fixed_sp_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """The paper's "TP2 SP4 without ESP": whole prompts, and one master for all rows (the least used instance; here it
    stays for a while, for with each change all rows open a page)."""
    return LanePolicy(cluster, limits, Rules(depth=1, single_master=True, reserves_output=True))


def replicas(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """Each instance alone, chunked, behind a balancer that knows how much each has left to compute."""
    return LanePolicy(cluster, limits, Rules(budget=limits.chunk_tokens), each_alone, least_work)


def replicas_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """The paper's "TP2 x 4": whole prompts, round robin."""
    return LanePolicy(cluster, limits, Rules(depth=1, reserves_output=True), each_alone, round_robin)


def disaggregated(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """Half of the instances compute prompts in chunks, half decode; KV migrates."""
    return Disaggregated(cluster, limits, Rules(budget=limits.chunk_tokens, depth=1), Rules(depth=1))


def disaggregated_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """DistServe: whole prompts, short ones put together up to `chunk_tokens`."""
    return Disaggregated(cluster, limits, Rules(batch_tokens=limits.chunk_tokens, depth=1), Rules(depth=1))


def loongserve(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """LoongServe by the text of its paper: in order of arrival, several batches by the exact programme, rows shared out
    evenly among masters, decode time by the cost model."""
    return LoongServe(cluster, limits, PAPER)


def loongserve_2024(cluster: ClusterConfig, limits: LimitsConfig) -> Baseline:
    """LoongServe as released, with the constants and the faults of its experiments."""
    return LoongServe(cluster, limits, Constants())


BASELINES: Mapping[str, Callable[[ClusterConfig, LimitsConfig], Baseline]] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            static_tp, static_tp_2024, chunked, chunked_2024, fixed_sp, fixed_sp_2024, replicas, replicas_2024,
            disaggregated, disaggregated_2024, loongserve, loongserve_2024,
        )
    }
)  # fmt: skip
