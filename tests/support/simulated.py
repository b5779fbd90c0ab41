"""Small simulations for tests: a machine with round numbers, and workloads written out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loong_jax.config import ClusterConfig, LadderConfig
from loong_jax.sim import SimConfig, Workload
from loong_jax.sim.workloads import Request
from loong_jax.types import ContextForm


class RoundTimes:
    """A prefill takes 1 ms and 10 us a token of an instance, a decode 1 ms and 1 us a row of the fullest master and
    1 us for 100 tokens of KV. Believed by policies as well as true."""

    coefficients: Mapping[str, float] = {}

    def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
        return 1e-3 + 1e-5 * tokens / dop

    def decode_s(self, dop: int, rows: int, rows_per_master: int, kv_tokens: int) -> float:
        return 1e-3 + 1e-6 * rows_per_master + 1e-8 * kv_tokens

    def migrate_s(self, tokens: int) -> float:
        return 1e-3 + 1e-6 * tokens

    def updated(self, coefficients: Mapping[str, float]) -> RoundTimes:
        return self


def small_cluster(num_instances: int = 2, pages: int = 64) -> ClusterConfig:
    ladder = LadderConfig(
        dops=tuple(range(1, num_instances + 1)), prefill_tokens=(64, 256), decode_rows=(8, 32), score_tokens=()
    )
    return ClusterConfig(
        num_instances=num_instances, page_tokens=8, pages_per_instance=pages, ring_tokens=64, query_tile_tokens=16,
        slots=64, ladder=ladder,
    )  # fmt: skip


def small_config(requests: Sequence[tuple[int, int, int]], **changes: object) -> SimConfig:
    """`requests`: (arrival in us, prompt length, output length)."""
    listed = tuple(Request(at_us, prompt, output, 64) for at_us, prompt, output in requests)
    fields: dict = {
        "times": RoundTimes(),
        "workload": Workload("by hand", 1.0, listed),
        "cluster": small_cluster(),
        **changes,
    }
    return SimConfig(**fields)
