"""When simulated steps start and end, and what they sample."""

import pytest

from loong_jax.ledger import InvariantError, Ledger
from loong_jax.sim.executor import FILLER, STOP, SimExecutor
from loong_jax.types import (
    ContextForm,
    CopyPages,
    DecodeRow,
    Migrate,
    PageCopy,
    PageMove,
    Phase,
    PrefillRow,
    Reset,
    Run,
    RunDecode,
    RunPrefill,
    Sampling,
    StepDone,
    StepFailed,
)
from tests.support.simulated import RoundTimes, small_cluster


def decode(step: int, instances: tuple[int, ...], rows: int = 1, position: int = 10) -> RunDecode:
    made = tuple(DecodeRow(r, r, position, -1, instances[0], 0, Run(0, 1), Sampling()) for r in range(rows))
    return RunDecode(step, instances, 8, made)


def prefill(step: int, instances: tuple[int, ...], count: int, *, first: int = 0) -> RunPrefill:
    row = PrefillRow(7, 7, (Run(first, count),), b"", (), (), True, Sampling())
    return RunPrefill(step, instances, 64, ContextForm.RING, (row,))


class Bench:
    def __init__(self, *, fused: bool = False) -> None:
        self.ledger = Ledger(small_cluster(3))
        self.ends: dict[int, int] = {}
        self.executor = SimExecutor(
            RoundTimes(), 3, self.ledger, lambda at_us, step: self.ends.update({step: at_us}), fused=fused, record=True
        )

    def submit(self, now_us: int, *commands) -> None:
        self.executor.stop_at |= {request: 99 for request in range(10) if request not in self.executor.stop_at}
        for command in commands:
            self.executor.submit(command)
        self.executor.start_ready(now_us)


def test_a_step_waits_for_all_its_instances() -> None:
    bench = Bench()
    bench.submit(0, prefill(0, (0,), 100), decode(1, (1,)), decode(2, (0, 1)))
    assert bench.ends == {0: 2000, 1: 1001}  # the third waits
    bench.executor.finish(1, 1001)
    assert 2 not in bench.ends  # instance 0 is busy
    bench.executor.finish(0, 2000)
    assert bench.ends[2] == 3001
    assert bench.executor.steps_in_flight == [2]


def test_two_steps_at_most() -> None:
    bench = Bench()
    bench.submit(0, decode(0, (0,)), decode(1, (0,)))
    with pytest.raises(InvariantError, match="INV-6"):
        bench.executor.submit(decode(2, (0, 1)))


def test_kv_of_the_fullest_instance_counts() -> None:
    bench = Bench()
    for instance, page, first, count in ((0, 0, 0, 8), (1, 0, 8, 8), (1, 1, 16, 8)):
        bench.ledger.reserve(instance, 1)
        bench.ledger.commit(0, instance, (page,), Run(first, count))
    bench.submit(0, decode(0, (0, 1)))
    assert bench.ends == {0: 1001}  # 16 tokens: 0.16 us, rounded
    assert bench.executor._kv_tokens(decode(0, (0, 1))) == 16


@pytest.mark.parametrize("prefill_first", [False, True])
def test_fused_steps_start_and_end_together(prefill_first: bool) -> None:
    bench = Bench(fused=True)
    commands = [decode(0, (0,), rows=5), prefill(1, (0,), 100)]
    bench.submit(10, *(commands[::-1] if prefill_first else commands))
    assert bench.ends == {0: 2015, 1: 2015}  # 1 ms + 100 tokens of 10 us + 5 rows of 1 us, once
    first, second = (1, 0) if prefill_first else (0, 1)
    bench.executor.finish(first, 2015)
    bench.executor.finish(second, 2015)
    assert [span.start_us for span in bench.executor.spans] == [10, 10]


def test_only_steps_of_two_phases_on_the_same_instances_fuse() -> None:
    bench = Bench(fused=True)
    bench.submit(0, decode(0, (0,)), decode(1, (0,)), decode(2, (1,)), prefill(3, (1, 2), 100))
    assert sorted(bench.ends) == [0, 2]


def test_a_row_does_not_fuse_with_the_prefill_that_samples_its_token() -> None:
    bench = Bench(fused=True)
    bench.submit(0, prefill(0, (0,), 100), decode(1, (0,), rows=8))  # request 7 is in both
    assert sorted(bench.ends) == [0]


def test_pairs_and_context_of_a_chunk() -> None:
    seen: list[tuple] = []

    class Spy(RoundTimes):
        def prefill_s(self, dop: int, tokens: int, pairs: float, context: int, form: ContextForm) -> float:
            seen.append((dop, tokens, pairs, context, form))
            return 1.0

    executor = SimExecutor(Spy(), 3, Ledger(small_cluster(3)), lambda at_us, step: None)
    executor.submit(prefill(0, (0, 1), 10, first=30))
    assert seen == [(2, 10, 10 * (5 + 30), 30, ContextForm.RING)]


def test_moves_and_copies_cost_their_tokens() -> None:
    bench = Bench()
    move = PageMove(3, 0, 0, 1, 0, Run(0, 8))
    bench.submit(0, Migrate(0, (0, 1), (move, move)), CopyPages(1, 2, (PageCopy(4, 0, 1, Run(0, 4)),)))
    assert bench.ends == {0: 1016, 1: 1004}
    assert [(span.phase, span.rows) for span in bench.executor.spans] == [
        (Phase.MIGRATE, ((3, 16),)),
        (Phase.COPY, ((4, 4),)),
    ]


def test_the_last_token_is_a_stop() -> None:
    bench = Bench()
    bench.executor.stop_at = {0: 11, 1: 10, 7: 99}
    bench.submit(0, decode(0, (0,), rows=2), prefill(1, (1,), 100), prefill(2, (2,), 99))
    sampled = {step: bench.executor.finish(step, 5000).tokens for step in (0, 1, 2)}
    assert sampled == {0: (FILLER, STOP), 1: (STOP,), 2: (FILLER,)}


def test_a_lost_pool_fails_every_step_there_until_its_reset() -> None:
    bench = Bench()
    bench.submit(0, decode(0, (0, 1)), decode(1, (1, 2)), decode(2, (0,)))
    bench.executor.poison((0,))
    answers = {step: bench.executor.finish(step, 5000) for step in (0, 1, 2)}
    assert {step: type(answer) for step, answer in answers.items()} == dict.fromkeys((0, 1, 2), StepFailed)
    assert answers[1] == StepFailed(1, (1, 2), "injected")  # the group of step 0 took instance 1 along
    bench.executor.apply(Reset((0, 1, 2)))
    bench.submit(6000, decode(3, (0, 1)))
    assert isinstance(bench.executor.finish(3, 9000), StepDone)


def test_no_reset_under_a_step() -> None:
    bench = Bench()
    bench.submit(0, decode(0, (0,)))
    with pytest.raises(InvariantError, match="reset"):
        bench.executor.apply(Reset((0,)))
