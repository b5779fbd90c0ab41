"""How one group works as an engine: whole prompts first or a token budget, masters, memory."""

from __future__ import annotations

import pytest

from loong_jax.config import LimitsConfig
from loong_jax.types import Free, Migrate, RunDecode, RunPrefill
from tests.support.served import Served, make_cluster

LIMITS = LimitsConfig(chunk_tokens=16, decode_headroom_pages=1)


def served(policy: str, num_instances: int = 1, limits: LimitsConfig = LIMITS, pages: int = 64) -> Served:
    return Served(make_cluster(num_instances, pages=pages), limits, policy=policy)


def steps(run: Served) -> list[str]:
    """In order: "p 0+8 1+4" is a prefill of eight tokens of request 0 and four of 1; "d 0 1" a decode of both."""
    out: list[str] = []
    for command in run.commands:
        if isinstance(command, RunPrefill):
            rows = [f"{row.request}+{sum(run.count for run in row.runs)}" for row in command.rows]
            out.append(" ".join(["p", *rows]))
        elif isinstance(command, RunDecode):
            out.append(" ".join(["d", *(str(row.request) for row in command.rows)]))
    return out


def two_prompts(policy: str, num_instances: int = 1) -> Served:
    """The second comes when the first has its first tokens."""
    run = served(policy, num_instances)
    run.arrive(20, 6)
    while not run.tokens[0]:
        run.step()
    run.arrive(40, 3)
    run.finish()
    return run


def test_static_tp_takes_whole_prompts_before_any_decode() -> None:
    """The second prompt is beyond a chunk, yet it goes in one step, and the rows wait for it."""
    assert steps(two_prompts("static_tp_2024")) == ["p 0+20", "d 0", "p 1+40", "d 0 1", "d 0 1", "d 0", "d 0"]


def test_chunked_gives_decodes_their_tokens_first_and_prompts_the_rest() -> None:
    """Sixteen tokens an iteration, in pages of four: fifteen are left beside one row, and are twelve."""
    expected = "p 0+16, p 0+4, d 0, d 0, p 1+12, d 0, p 1+12, d 0, p 1+12, d 0, p 1+4, d 1, d 1"
    assert ", ".join(steps(two_prompts("chunked_2024"))) == expected


def test_chunked_today_is_one_step_ahead_where_only_decodes_are_left() -> None:
    run = served("chunked")
    run.arrive(8, 5)
    run.step()
    assert [s for s in steps(run) if s == "d 0"] == ["d 0", "d 0"]
    run = served("chunked_2024")
    run.arrive(8, 5)
    run.step()
    assert [s for s in steps(run) if s == "d 0"] == ["d 0"]


def test_an_iteration_is_queued_together_on_an_idle_group() -> None:
    """Hardware that fuses them sees decode and chunk at once, behind nothing."""
    run = served("chunked")
    run.arrive(4, 30)
    run.step()
    run.arrive(60, 2)
    seen = len(run.commands)
    while not any(isinstance(command, RunPrefill) for command in run.commands[seen:]):
        seen = len(run.commands)
        run.step()
    new = [type(command) for command in run.commands[seen:] if isinstance(command, RunDecode | RunPrefill)]
    assert new == [RunDecode, RunPrefill]
    assert run.manager.state.queued == [2]


def masters(run: Served) -> list[set[int]]:
    return [{row.master for row in decode.rows} for decode in run.of(RunDecode)]


def test_fixed_sp_computes_on_all_instances_and_has_all_of_them_masters() -> None:
    run = served("fixed_sp", 4)
    for _ in range(8):
        run.arrive(16, 8)
    run.finish()
    assert {command.instances for command in (*run.of(RunPrefill), *run.of(RunDecode))} == {(0, 1, 2, 3)}
    assert max(len(found) for found in masters(run)) == 4
    assert {share for prefill in run.of(RunPrefill) for row in prefill.rows for share in row.homes} == {0, 1, 2, 3}


def test_fixed_sp_of_2024_has_one_master() -> None:
    run = served("fixed_sp_2024", 4)
    for _ in range(4):
        run.arrive(16, 8)
    run.finish()
    assert {len(found) for found in masters(run)} == {1}
    assert {command.instances for command in run.of(RunDecode)} == {(0, 1, 2, 3)}


@pytest.mark.parametrize("policy", ["static_tp", "chunked", "replicas"])
def test_the_newest_is_evicted_and_computed_again(policy: str) -> None:
    run = Served(make_cluster(1, pages=16), LimitsConfig(chunk_tokens=16, decode_headroom_pages=0), policy=policy)
    for _ in range(3):
        run.arrive(16, 40)
    run.finish()
    evicted = [free.request for free in run.of(Free)]
    assert len(evicted) > 3
    assert evicted.count(0) == 1  # only at its end
    assert not run.of(Migrate)


def test_the_oldest_row_never_waits_for_a_page() -> None:
    """The newest goes at once, not when nobody can do anything."""
    run = Served(make_cluster(1, pages=16), LimitsConfig(decode_headroom_pages=0), policy="static_tp_2024")
    for _ in range(3):
        run.arrive(16, 40)
    run.finish()
    decodes = [[row.request for row in decode.rows] for decode in run.of(RunDecode)]
    assert sum(0 in rows for rows in decodes) == 39
    assert all(0 in rows for rows in decodes[:39])


def test_a_reserve_for_the_output_admits_only_what_cannot_outgrow_the_pool() -> None:
    run = Served(make_cluster(1, pages=16), LIMITS, policy="chunked_2024")
    for _ in range(3):
        run.arrive(16, 40)
    run.finish()
    assert len(run.of(Free)) == 3
