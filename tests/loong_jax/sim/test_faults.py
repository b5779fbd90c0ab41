"""Faults are drawn from their seed, counted, and obey the driver's contract."""

from collections import Counter

import pytest

from loong_jax.config import ConfigError
from loong_jax.manager import Manager
from loong_jax.sim import run
from loong_jax.sim.faults import FaultPlan, Faults
from loong_jax.types import InstanceLost, Phase, Program, Reset, StepDone, StepFailed
from tests.support.simulated import small_config

MANY = [(500 * i, 5 + 37 * i % 200, 1 + i % 13) for i in range(40)]


def test_each_kind_is_drawn_and_counted() -> None:
    """Certain faults happen every time they are asked for, impossible ones never."""
    plan = FaultPlan(Faults(p_slow=1.0, p_fail=1.0, p_late=1.0, p_twice=1.0, p_jump=1.0, p_abort=0.0))
    assert plan.stretch(1.0) > 1.0
    assert plan.fails()
    first, second = plan.deliveries()
    assert 0 < first <= second
    assert plan.jump_us() > 0
    assert not plan.aborts()
    assert plan.counts == {"slow": 1, "failed": 1, "late": 1, "twice": 1, "clock jump": 1}
    assert FaultPlan(Faults(p_lost=1.0)).deliveries() == []


def test_programs_may_be_late_but_not_those_that_readiness_waits_for() -> None:
    programs = [(Program(Phase.DECODE, dop, 8), i) for dop, i in ((1, (0,)), (1, (1,)), (2, (0, 1)))]
    now, later = FaultPlan(Faults(p_unready=1.0)).ready(programs)
    assert [instances for _, instances in now] == [(0,), (0, 1)]
    assert [(program, instances) for _, (program, instances) in later] == [programs[1]]


@pytest.mark.parametrize("field", ["p_slow", "p_storm"])
def test_bad_probabilities_are_named(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Faults(**{field: 1.5})
    with pytest.raises(ConfigError, match="watchdog_us"):
        Faults(watchdog_us=0)


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("slow", Faults(p_slow=0.3)),
        ("failed", Faults(p_fail=0.05)),
        ("late", Faults(p_late=0.5, late_us=5000)),
        ("lost completion", Faults(p_lost=0.03, watchdog_us=5000)),
        ("twice", Faults(p_twice=0.5, late_us=5000)),
        ("abort", Faults(p_abort=0.05)),
        ("stop", Faults(p_stop=0.05)),
        ("lost instance", Faults(p_lose=0.01)),
        ("clock jump", Faults(p_jump=0.05)),
        ("not ready", Faults(p_unready=1.0)),
        ("storm", Faults(p_storm=0.8)),
    ],
)
def test_requests_live_through_each_kind_alone(kind: str, faults: Faults) -> None:
    result = run(small_config(MANY, faults=faults, check_every=1))
    assert result.faults[kind] > 0
    assert set(result.faults) == {kind}
    ended = Counter(o.status for o in result.outcomes)
    assert ended["finished"] + ended["aborted"] == len(MANY), ended
    assert ended["aborted"] == (result.faults["abort"] if kind == "abort" else 0)


def events_of(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> list[tuple]:
    """(event, commands) of a run."""
    seen: list[tuple] = []
    handle = Manager.handle

    def watched(self: Manager, event: object, now_us: int) -> list:
        commands = handle(self, event, now_us)  # type: ignore[arg-type]
        seen.append((now_us, event, commands))
        return commands

    monkeypatch.setattr(Manager, "handle", watched)
    run(small_config(MANY, faults=faults))
    return seen


def test_a_lost_instance_fails_its_steps_until_it_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = events_of(monkeypatch, Faults(p_lose=0.01, rejoin_us=2000, seed=3))
    lost = next(i for i, (_, event, _) in enumerate(seen) if isinstance(event, InstanceLost))
    instance = seen[lost][1].instance
    for _, _, commands in seen[lost + 1 :]:
        if any(isinstance(c, Reset) and instance in c.instances for c in commands):
            break
        assert not any(instance in getattr(c, "instances", ()) and hasattr(c, "step") for c in commands)
    else:
        raise AssertionError("never reset")


def test_the_watchdog_answers_for_a_completion_that_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is answered, and none of those given up before its time."""
    seen = events_of(monkeypatch, Faults(p_lost=0.03, watchdog_us=5000))
    issued = {c.step for _, _, commands in seen for c in commands if hasattr(c, "step")}
    answers = [e for _, e, _ in seen if isinstance(e, StepDone | StepFailed)]
    assert {e.step for e in answers} >= issued - {max(issued), max(issued) - 1}  # the last may be in flight
    assert any(isinstance(e, StepFailed) and e.reason == "no answer" for e in answers)
    assert any(isinstance(e, StepFailed) and e.reason == "injected" for e in answers)  # queued behind


def test_the_clock_only_jumps_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [now_us for now_us, _, _ in events_of(monkeypatch, Faults(p_jump=0.05))]
    assert times == sorted(times)
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) > 1_000_000
