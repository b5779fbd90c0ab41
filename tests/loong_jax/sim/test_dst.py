"""Deterministic simulation testing: many seeds, all invariants after every event, contents as on devices, replay."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from loong_jax.policy import POLICIES
from tests.support import dst

NUM_SEEDS, NUM_SLOW_SEEDS, AT_ONCE = 500, 10_000, 100
ROOT = Path(__file__).resolve().parents[3]


def run_seeds(seeds: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            result = dst.simulate(seed)
            again = dst.replayed_hash(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: dst.simulate({seed}) fails: {error!r:.2000}") from error
        assert again == result.event_log_hash, f"seed {seed}: another event log on replay"
        counts.update(result.faults)
        counts["events"] += result.num_events
    return counts


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, AT_ONCE))
def test_seeds(first: int) -> None:
    counts = run_seeds(range(first, first + AT_ONCE))
    assert set(dst.KINDS) <= set(counts), counts
    assert min(counts[kind] for kind in dst.KINDS) >= 5, counts


@pytest.mark.slow
@pytest.mark.parametrize("first", range(NUM_SEEDS, NUM_SEEDS + NUM_SLOW_SEEDS, 10 * AT_ONCE))
def test_many_seeds(first: int) -> None:
    run_seeds(range(first, first + 10 * AT_ONCE))


def test_other_processes_give_the_same_bytes() -> None:
    """Nothing depends on the order of sets or on addresses: string hashes differ between the processes."""
    program = "from tests.support import dst\nprint([dst.simulate(seed).event_log_hash for seed in range(12)])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1, printed


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones(policy: str) -> None:
    dst.check_crowd(policy)
