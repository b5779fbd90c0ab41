"""The discrete-event simulator: the unchanged manager, policies and ledger on a virtual clock (floor 5, no JAX)."""

from __future__ import annotations

from loong_jax.sim.config import Outcome, Result, SimConfig, sim_cluster
from loong_jax.sim.driver import SimStuck, run
from loong_jax.sim.metrics import Slo
from loong_jax.sim.workloads import Workload, make_workload

__all__ = ["Outcome", "Result", "SimConfig", "SimStuck", "Slo", "Workload", "make_workload", "run", "sim_cluster"]
