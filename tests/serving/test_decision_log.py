"""Each decision is told once, with its reason, by the client's name of the request."""

import logging

import pytest

from loong_jax.types import (
    Arrived,
    ContextForm,
    Drain,
    Finish,
    FinishReason,
    Free,
    InstanceLost,
    InstanceView,
    PrefillRow,
    Reject,
    RejectReason,
    Run,
    RunPrefill,
    Sampling,
    StepFailed,
    Tick,
)
from serving.decision_log import DecisionLog, why_waits


class Lines:
    def __init__(self):
        self.told = []

    def tell(self, level, event, **fields):
        self.told.append((logging.getLevelName(level), event, fields))

    @property
    def events(self):
        return [event for _, event, _ in self.told]


class Waiting:
    def __init__(self, request, prompt_len):
        self.request, self.prompt_len = request, prompt_len


class Seen:
    """A view with what `why_waits` reads."""

    page_tokens = 16

    def __init__(self, *instances, places=5, waiting=None):
        self.instances, self.free_places = instances, places
        self.waiting = (Waiting(1, 160),) if waiting is None else waiting


def instance(free=100, queued=0, prefilling=0, alive=True):
    return InstanceView(0, free, 100, queued, prefilling, alive)


def view():
    return Seen(instance(free=3))


def arrived(log, number, now_us, commands=()):
    log.arrives([number], f"name-{number}")
    log.saw(Arrived(number, b"\0" * 640, 8, Sampling(), ()), commands, view, now_us)


def prefill(number):
    row = PrefillRow(number, 0, (Run(0, 16),), b"", (0,), (0,), True, Sampling())
    return RunPrefill(0, (0,), 16, ContextForm.RING, (row,))


@pytest.fixture
def made():
    lines = Lines()
    return DecisionLog(lines), lines


def test_who_waits_is_told_why_once_and_again_much_later(made):
    log, lines = made
    arrived(log, 1, 0)
    for now_us in range(0, 40_000_000, 100_000):
        log.saw(Tick(), (), view, now_us)
    assert lines.events == ["waits", "waits"]
    level, _, fields = lines.told[0]
    assert level == "INFO"
    assert fields["request_id"] == "name-1"
    assert fields["reason"] == "its prompt needs 11 pages, 3 are free"
    assert 1.0 <= fields["waited_s"] <= 2.1


def test_who_starts_at_once_is_no_news(made):
    log, lines = made
    arrived(log, 1, 0, (prefill(1),))
    log.saw(Tick(), (), view, 5_000_000)
    log.saw(Tick(), (Finish(1, FinishReason.LENGTH, 8), Free(1, (0,))), view, 6_000_000)
    assert lines.told == []
    assert (log._names, log._waiting, log._started) == ({}, {}, set())


def test_evictions_and_losses_are_told_apart(made):
    log, lines = made
    arrived(log, 1, 0, (prefill(1),))
    log.saw(Tick(), (Free(1, (0, 2)),), view, 10)
    level, event, fields = lines.told[0]
    assert (level, event, fields["reason"], fields["instances"]) == ("INFO", "evicted", "memory for others", [0, 2])
    log.saw(Tick(), (prefill(1),), view, 20)
    log.saw(StepFailed(0, (0,), "out of luck"), (Free(1, (0,)),), view, 30)
    assert lines.events[1:] == ["step failed", "evicted"]
    assert lines.told[2][0] == "WARNING"
    log.saw(InstanceLost(3), (), view, 40)
    assert lines.told[3][2] == {"instance": 3}


def test_refusals_failures_and_those_who_leave(made):
    log, lines = made
    arrived(log, 1, 0, (Reject(1, RejectReason.TOO_LARGE, "needs 9 pages"),))
    assert lines.told[0][2] == {"request_id": "name-1", "reason": "too_large", "message": "needs 9 pages"}
    arrived(log, 2, 0)
    log.saw(Tick(), (Finish(2, FinishReason.ABORT, 0),), view, 2_500_000)
    assert lines.told[1][1:] == ("left while waiting", {"request_id": "name-2", "waited_s": 2.5})
    arrived(log, 3, 0, (prefill(3),))
    log.saw(Tick(), (Finish(3, FinishReason.ERROR, 0, "broke"),), view, 1)
    assert lines.told[2][:2] == ("ERROR", "failed")
    log.saw(Drain(), (), view, 2)
    assert lines.events[-1] == "draining"


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (Seen(instance(), places=0), "as many requests run as may"),
        (Seen(instance(alive=False)), "no instance is there"),
        (Seen(instance(free=10)), "its prompt needs 11 pages, 10 are free"),
        (Seen(instance(queued=2), instance(prefilling=1)), "all instances are busy with steps issued before"),
        (Seen(instance(), instance()), "the policy lets others go before it"),
        (Seen(instance(), waiting=()), "its turn has come"),
    ],
)
def test_reasons(seen, reason):
    assert why_waits(seen, 1) == reason


def test_of_many_who_wait_a_few_are_told(made):
    log, lines = made
    for number in range(50):
        arrived(log, number, 0)
    log.saw(Tick(), (), view, 3_000_000)
    assert lines.events == ["waits"] * 5
