"""The account of the elastic state, from a tape of events and commands."""

from loong_jax.cost.unmeasured import unmeasured
from loong_jax.types import (
    Arrived,
    ContextForm,
    DecodeRow,
    Drain,
    Finish,
    FinishReason,
    Free,
    InstanceView,
    Migrate,
    PageMove,
    Phase,
    PrefillRow,
    Program,
    ProgramReady,
    Reject,
    RejectReason,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    StepDone,
    StepFailed,
)
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.state import EngineState
from serving.step_times import StepTimes
from tests.support.views import SeenView

S = Sampling()


def prefill(step, instances, requests, num_tokens=10, moves=()):
    rows = tuple(PrefillRow(r, r, (Run(0, num_tokens),), b"", (), (), True, S) for r in requests)
    return RunPrefill(step, instances, 16, ContextForm.RING, rows, moves)


def decode(step, instances, requests):
    return RunDecode(step, instances, 8, tuple(DecodeRow(r, r, 1, -1, 0, 0, Run(0, 1), S) for r in requests))


def move(count):
    return PageMove(0, 0, 0, 1, 0, Run(0, count))


class Tape:
    def __init__(self, needed=()):
        self.state = EngineState(kv_token_bytes=100, compiles_after_ready=lambda: 3)
        self.state.wait_for(needed)
        self.now_us = 0

    def play(self, *items, after_us=1000):
        for item in items:
            self.now_us += after_us
            if isinstance(item, Arrived | StepDone | StepFailed | ProgramReady | Drain):
                self.state.saw_event(item, self.now_us)
            else:
                self.state.saw_command(item, self.now_us)

    def snapshot(self) -> pb.State:
        instances = (InstanceView(0, 3, 10, 0, 0, True), InstanceView(1, 10, 10, 2, 0, False))
        return self.state.snapshot(SeenView(16, instances, now_us=self.now_us), self.now_us)

    def groups(self):
        return [(group.phase, tuple(group.instances), group.requests) for group in self.snapshot().groups]


def arrived(request):
    return Arrived(request, b"", 4)


def test_scale_down_up_and_merge():
    tape = Tape()
    tape.play(arrived(0), prefill(0, (0, 1, 2, 3), (0,)), StepDone(0), decode(1, (0,), (0,)))
    assert (tape.snapshot().counters.scale_ups, tape.snapshot().counters.scale_downs) == (0, 1)
    tape.play(StepDone(1), decode(2, (0, 1), (0,)), StepDone(2), decode(3, (0, 1), (0,)), StepDone(3))
    assert (tape.snapshot().counters.scale_ups, tape.snapshot().counters.scale_downs) == (1, 1)
    tape.play(arrived(1), prefill(4, (2, 3), (1,)), StepDone(4), decode(5, (0, 1, 2, 3), (0, 1)))
    assert (tape.snapshot().counters.scale_ups, tape.snapshot().counters.scale_downs) == (3, 1)


def test_groups_are_those_of_now():
    tape = Tape()
    tape.play(arrived(0), arrived(1), prefill(0, (0, 1), (0,)), decode(1, (2, 3), (1,)))
    assert tape.groups() == [(pb.PHASE_PREFILL, (0, 1), 1), (pb.PHASE_DECODE, (2, 3), 1)]
    tape.play(StepDone(0), decode(2, (0,), (0,)))
    assert tape.groups() == [(pb.PHASE_DECODE, (0,), 1), (pb.PHASE_DECODE, (2, 3), 1)]
    tape.play(StepDone(1), StepDone(2), after_us=2_000_000)
    tape.play(Drain(), after_us=2_000_000)
    assert tape.groups() == []
    assert tape.snapshot().draining


def test_two_steps_in_flight_are_one_group():
    tape = Tape()
    tape.play(decode(0, (0,), (0,)), decode(1, (0,), (0,)), StepDone(0))
    assert tape.groups() == [(pb.PHASE_DECODE, (0,), 1)]


def test_a_group_that_shares_an_instance_with_another_keeps_its_rate():
    tape = Tape()
    for step in range(0, 20, 2):  # each step takes 300 ms; instance 0 does both
        tape.play(prefill(step, (0, 1), (0,), 90), decode(step + 1, (0,), (1,)), after_us=0)
        tape.play(StepDone(step), StepDone(step + 1), after_us=150_000)
    rates = {group.phase: group.tokens_per_s for group in tape.snapshot().groups}
    assert 2.5 < rates[pb.PHASE_DECODE] < 4
    tape.play(prefill(20, (0, 1), (0,), 90))
    rates = {group.phase: group.tokens_per_s for group in tape.snapshot().groups}
    assert 200 < rates[pb.PHASE_PREFILL] < 400


def test_rates():
    tape = Tape()
    for step in range(200):  # two rows every 20 ms
        tape.play(decode(step, (0,), (0, 1)), after_us=0)
        tape.play(StepDone(step), after_us=20_000)
    (group,) = tape.snapshot().groups
    assert 90 < group.tokens_per_s < 110


def test_counters_and_pools():
    tape = Tape()
    tape.play(arrived(0), arrived(1), arrived(2), Reject(2, RejectReason.QUEUE_FULL, ""))
    tape.play(prefill(0, (0, 1), (0,), 40, (move(16), move(4))), Migrate(1, (0, 1), (move(7),)))
    state = tape.snapshot()
    assert (state.requests_waiting, state.requests_running) == (1, 1)
    tape.play(StepDone(0), StepDone(1), decode(2, (0, 1), (0,)), StepFailed(2, (1,), "x"))
    tape.play(Finish(0, FinishReason.LENGTH, 1))
    state = tape.snapshot()
    counters = state.counters
    assert (counters.kv_bytes_migrated, counters.kv_bytes_rehomed) == (700, 2000)
    assert (counters.steps_prefill, counters.steps_decode, counters.steps_failed) == (1, 1, 1)
    assert (counters.tokens_prefilled, counters.requests_finished, counters.requests_refused) == (40, 1, 1)
    assert counters.compiles_after_ready == 3
    assert [(i.pages_used, i.pages_total, i.alive) for i in state.instances] == [(7, 10, True), (0, 10, False)]
    assert state.requests_running == 0


def test_ready_when_all_needed_programs_are():
    needed = [(Program(Phase.DECODE, 1, 1), (0,)), (Program(Phase.DECODE, 2, 1), (0, 1))]
    tape = Tape(needed)
    tape.play(ProgramReady(needed[0][0], (1,)), ProgramReady(*needed[1]))
    assert not tape.state.ready
    tape.play(ProgramReady(*needed[0]))
    assert tape.state.ready
    assert tape.snapshot().programs_ready == 3


def test_predictions_are_told_by_phase():
    times = StepTimes(unmeasured(), lambda request: {}, 2)
    state = EngineState(kv_token_bytes=100, compiles_after_ready=lambda: 0, step_times=times)
    state.saw_command(prefill(0, (0, 1), [1]), 0)
    state.saw_event(StepDone(0), 1_000_000)
    told = state.snapshot(SeenView(16, ()), 1_000_000)
    assert [(p.phase, p.steps) for p in told.predictions] == [(pb.PHASE_PREFILL, 1)]
    assert 0.9 < told.predictions[0].error <= 1
    assert told.predictions[0].bias == -told.predictions[0].error
    assert told.counters.cost_refits == 0
    assert state.cost_update(0) is None


def test_evictions_by_their_reason_and_masters():
    tape = Tape()
    rows = tuple(DecodeRow(r, r, 1, -1, master, 0, Run(0, 1), S) for r, master in ((1, 0), (2, 3), (3, 3)))
    tape.play(*(Arrived(r, b"", 5, S) for r in (1, 2, 3)), prefill(0, (0, 3), (1, 2, 3)), StepDone(0, (), ()))
    tape.play(RunDecode(1, (0, 3), 8, rows))
    (group,) = [group for group in tape.snapshot().groups if group.phase == pb.PHASE_DECODE]
    assert group.masters == 2
    tape.play(StepDone(1, (), ()), Free(1, (0, 3)))  # for others: it waits again
    tape.play(RunDecode(2, (0, 3), 8, rows[1:]), StepFailed(2, (3,), "x"), Free(2, (3,)))
    tape.play(Finish(3, FinishReason.STOP, 1), Free(3, (0, 3)))  # its end
    state = tape.snapshot()
    assert (state.counters.evictions, state.counters.evictions_by_loss) == (1, 1)
    assert (state.requests_running, state.requests_waiting) == (1, 1)
