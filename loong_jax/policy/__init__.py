"""Policies (floor 2): `plan(view, cost) -> Plan`, replaceable by passing another object to the manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.cost import CostModel
from loong_jax.policy.baselines import BASELINES
from loong_jax.policy.elastic import Elastic
from loong_jax.types import Plan, View


class NamedPolicy(Protocol):
    def plan(self, view: View, cost: CostModel) -> Plan: ...


POLICIES: Mapping[str, Callable[[ClusterConfig, LimitsConfig], NamedPolicy]] = MappingProxyType(
    {"elastic": Elastic, **BASELINES}
)
"""By the names that the command line and the event log use."""
