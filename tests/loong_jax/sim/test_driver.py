"""The loop around the unchanged manager."""

import pytest

from loong_jax.config import ConfigError
from loong_jax.manager import Manager
from loong_jax.sim import SimStuck, make_workload, run, sim_cluster
from loong_jax.types import Phase, Plan, Tick
from tests.support.simulated import RoundTimes, small_config

MANY = [(1000 * i, 5 + 37 * i % 200, 1 + i % 13) for i in range(40)]


def test_one_request_takes_what_its_steps_take() -> None:
    """A prefill of 10 tokens on one instance, then decode steps one after the other."""
    result = run(small_config([(500, 10, 3)], record=True))
    (outcome,) = result.outcomes
    assert (outcome.status, outcome.emitted) == ("finished", 3)
    prefill, *decodes = result.spans
    assert (prefill.phase, prefill.start_us, outcome.first_us) == (Phase.PREFILL, 500, prefill.end_us)
    assert outcome.last_us == decodes[1].end_us
    assert decodes[0].end_us - decodes[0].start_us == 1001


def test_every_request_ends_and_the_same_config_gives_the_same_bytes() -> None:
    one, two = (run(small_config(MANY, check_every=1)) for _ in range(2))
    assert [o.status for o in one.outcomes] == ["finished"] * len(MANY)
    assert [o.emitted for o in one.outcomes] == [output for _, _, output in MANY]
    assert one.event_log_hash == two.event_log_hash
    assert one.outcomes == two.outcomes
    other = run(small_config([*MANY[:-1], (39_000, 5, 2)]))
    assert other.event_log_hash != one.event_log_hash


def test_steps_of_an_instance_do_not_overlap() -> None:
    result = run(small_config(MANY, record=True))
    for instance in range(2):
        spans = sorted((s.start_us, s.end_us) for s in result.spans if instance in s.instances)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_what_is_not_finished_is_told() -> None:
    result = run(small_config([(0, 10, 2), (0, 10, 60)], drain_s=0.02))
    assert [o.status for o in result.outcomes] == ["finished", "unfinished"]
    assert result.summary.unfinished == 1


def test_too_large_requests_are_rejected() -> None:
    result = run(small_config([(0, 5000, 2), (0, 10, 2)]))
    assert [o.status for o in result.outcomes] == ["rejected", "finished"]


class Idle:
    """Plans nothing, ever."""

    def __init__(self, *_: object) -> None: ...

    def plan(self, view: object, cost: object) -> Plan:
        return Plan()


def test_waiting_for_nothing_is_an_error() -> None:
    with pytest.raises(SimStuck, match="request 0"):
        run(small_config([(0, 10, 2)], policy=Idle))


def test_a_tick_comes_when_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill of 2,000 tokens takes 11 ms; ticks of 4 ms come in between."""
    seen: list[tuple[int, bool]] = []
    handle = Manager.handle

    def watched(self: Manager, event: object, now_us: int) -> list:
        seen.append((now_us, isinstance(event, Tick)))
        return handle(self, event, now_us)  # type: ignore[arg-type]

    monkeypatch.setattr(Manager, "handle", watched)
    config = small_config([(0, 2000, 1)], tick_us=4000, cluster=sim_cluster(2, pool_tokens=4096))
    run(config)
    assert [now_us for now_us, tick in seen if tick] == [4000, 8000]


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="policy"):
        run(small_config([], policy="none such"))


def test_programs_on_all_subsets_or_on_arcs() -> None:
    cluster = sim_cluster(4, pool_tokens=4096)
    sets = {}
    for subsets in (False, True):
        from loong_jax.sim.driver import Simulation

        simulation = Simulation(small_config([], cluster=cluster, subsets=subsets))
        sets[subsets] = {instances for _, instances in simulation.programs()}
    assert (0, 2) in sets[True] - sets[False]
    assert len(sets[True]) == 15


def test_a_named_workload_runs() -> None:
    workload = make_workload("zipf-1.4", rate=20.0, num_requests=60, seed=3)
    config = small_config([], cluster=sim_cluster(4, pool_tokens=100_000), times=RoundTimes())
    result = run(type(config)(times=config.times, workload=workload, cluster=config.cluster))
    assert result.summary.finished == 60


@pytest.mark.parametrize("policy", ["elastic", "chunked", "loongserve"])
def test_nothing_is_decided_by_lengths_that_nobody_knows(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-9: until the first text ends, the same commands, however long the texts will be."""
    seen: list[list] = []
    handle = Manager.handle

    def watched(self: Manager, event: object, now_us: int) -> list:
        commands = handle(self, event, now_us)  # type: ignore[arg-type]
        seen[-1].append((now_us, event, commands))
        return commands

    monkeypatch.setattr(Manager, "handle", watched)
    for extra in (0, 1, 30):
        seen.append([])
        run(small_config([(at_us, prompt, 20 + output + extra) for at_us, prompt, output in MANY], policy=policy))
    short, longer, long = seen
    for other in (longer, long):
        same = next(i for i, (a, b) in enumerate(zip(short, other, strict=False)) if a[:2] != b[:2])
        assert same > 50
        assert [c for *_, c in short[:same]] == [c for *_, c in other[:same]]
