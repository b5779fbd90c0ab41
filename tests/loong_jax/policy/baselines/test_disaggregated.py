"""Prefill here, decode there, KV moved in between."""

from __future__ import annotations

import pytest

from loong_jax.config import ClusterConfig, ConfigError, LadderConfig, LimitsConfig
from loong_jax.policy import POLICIES
from loong_jax.types import Finish, Free, InstanceLost, Migrate, RunDecode, RunPrefill
from tests.support.served import Served, make_cluster

LIMITS = LimitsConfig(chunk_tokens=16, decode_headroom_pages=1)


def kinds(run: Served) -> str:
    names = {RunPrefill: "p", RunDecode: "d", Migrate: "m"}
    return " ".join(f"{names[type(c)]}{c.instances}" for c in run.commands if type(c) in names)


def test_a_prompt_moves_over_before_its_first_decode() -> None:
    """Ten pages, sixteen tokens a chunk: three chunks on (0, 1), five pages on each; every pair moves at once."""
    run = Served(make_cluster(4), LIMITS, policy="disaggregated")
    run.arrive(40, 3)
    run.finish()
    assert kinds(run) == " ".join(["p(0, 1)"] * 3 + ["m(0, 2)", "m(1, 3)"] + ["d(2, 3)"] * 2)
    assert run.executor.moved_pages == 10
    assert len(run.of(Free)) == 1


def test_whole_prompts_in_2024() -> None:
    run = Served(make_cluster(4), LIMITS, policy="disaggregated_2024")
    for prompt_len in (40, 8, 8, 8):
        run.arrive(prompt_len, 2)
    run.finish()
    rows = [[sum(r.count for r in row.runs) for row in prefill.rows] for prefill in run.of(RunPrefill)]
    assert rows == [[40], [8, 8], [8]]  # put together up to a chunk's sixteen tokens


def test_prompts_wait_neither_for_decodes_nor_the_other_way_round() -> None:
    """A prompt of many chunks beside a row: the row decodes on while each chunk is computed."""
    run = Served(make_cluster(2, pages=64), LIMITS, policy="disaggregated")
    run.arrive(8, 30)
    while len(run.tokens[0]) < 4:
        run.step()
    run.arrive(120, 2)
    while not run.tokens[1]:
        run.step()
    assert {c.instances for c in run.of(RunPrefill)} == {(0,)}
    assert {c.instances for c in run.of(RunDecode)} == {(1,)}
    run.finish()


def test_what_the_second_half_has_no_room_for_stays_on_the_first() -> None:
    """Each request holds most of an instance: the second is computed, and moves when the first has ended."""
    run = Served(make_cluster(2), LimitsConfig(chunk_tokens=64), policy="disaggregated")
    run.arrive(50, 14)
    run.arrive(50, 5)
    run.finish()
    order = [c for c in run.commands if isinstance(c, RunPrefill | Migrate | Finish)]
    last_prefill = max(i for i, c in enumerate(order) if isinstance(c, RunPrefill))
    end_of_0 = next(i for i, c in enumerate(order) if isinstance(c, Finish) and c.request == 0)
    moves_of_1 = [i for i, c in enumerate(order) if isinstance(c, Migrate) and c.moves[0].request == 1]
    assert last_prefill < end_of_0 < min(moves_of_1)
    assert len(run.of(Free)) == 2  # nobody was evicted


def test_the_halves_are_cut_anew_when_an_instance_is_lost() -> None:
    run = Served(make_cluster(4, pages=64), LIMITS, policy="disaggregated")
    for _ in range(6):
        run.arrive(30, 12)
    for _ in range(12):
        run.step()
    run.executor.lose(3)
    run.handle(InstanceLost(3))
    seen = len(run.commands)
    run.finish()
    later = [c for c in run.commands[seen:] if isinstance(c, RunPrefill | RunDecode)]
    assert {c.instances for c in later if isinstance(c, RunDecode)} == {(1, 2)}
    assert {c.instances for c in later if isinstance(c, RunPrefill)} <= {(0,), (0, 1)}  # (0, 1): queued before
    assert all(isinstance(end, Finish) for end in run.ends.values())


@pytest.mark.parametrize("cluster", [make_cluster(1), ClusterConfig(3, ladder=LadderConfig(dops=(1, 3)))])
def test_a_cluster_that_cannot_be_parted_is_refused(cluster: ClusterConfig) -> None:
    with pytest.raises(ConfigError, match="dops"):
        POLICIES["disaggregated"](cluster, LIMITS)
