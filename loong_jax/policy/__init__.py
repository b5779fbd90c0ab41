"""Policies (floor 2): `plan(view, cost) -> Plan`, replaceable by passing another object to the manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from loong_jax.config import ClusterConfig, LimitsConfig
from loong_jax.policy.simple_elastic import SimpleElastic

POLICIES: Mapping[str, Callable[[ClusterConfig, LimitsConfig], SimpleElastic]] = MappingProxyType(
    {"simple_elastic": SimpleElastic}
)
"""By the names that the command line and the event log use."""
