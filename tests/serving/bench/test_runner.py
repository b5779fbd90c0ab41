"""Requests at their times, within bounds, cut off when told to; the clock is the runner's."""

import asyncio

from serving.bench.backends import BackendError, Ended, Got
from serving.bench.prompts import Item
from serving.bench.runner import CUT_OFF, Run, run_all


class Backend:
    """Two pieces, of one and two tokens; text "fail" and "hang" do that, "more" has tokens that no piece told of."""

    def __init__(self):
        self.open = self.most = 0

    async def stream(self, item):
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            yield Got(1, "a")
            await asyncio.sleep(3600 if item.prompt == "hang" else 0.01)
            if item.prompt == "fail":
                raise BackendError("no")
            yield Got(2, "bc")
            yield Ended(None, 5 if item.prompt == "more" else None, "stop")
        finally:
            self.open -= 1


def played(texts, arrivals_s=None, most=None, cancel_s=None):
    async def play():
        backend, run = Backend(), Run([Item(text, 7, 3) for text in texts])
        running = asyncio.ensure_future(run_all(run, backend, arrivals_s or [0.0] * len(texts), most))
        if cancel_s is not None:
            await asyncio.sleep(cancel_s)
            running.cancel()
        await running
        return backend, run

    return asyncio.run(play())


def test_pieces_become_times():
    _, run = played(["x"])
    (outcome,) = run.outcomes.values()
    assert outcome.success
    assert (outcome.num_tokens, outcome.num_prompt_tokens, outcome.text) == (3, 7, "abc")
    assert len(outcome.itls_s) == 1
    assert outcome.itls_s[0] >= 0.01
    assert outcome.ttft_s < outcome.latency_s == outcome.pieces[-1][0]
    assert abs(outcome.tpot_s - (outcome.latency_s - outcome.ttft_s) / 2) < 1e-9
    assert (run.num_tokens, run.num_open, run.done) == (3, 0, [0])


def test_tokens_that_no_piece_told_of_came_with_the_last():
    _, run = played(["more"])
    assert [num for _, num in run.outcomes[0].pieces] == [1, 4]
    assert run.num_tokens == run.outcomes[0].num_tokens == 5


def test_requests_wait_for_their_time_and_a_place():
    backend, run = played(["x"] * 6, arrivals_s=[0.0, 0.05, 0.1, 0.1, 0.1, 0.1], most=2)
    assert backend.most == 2
    assert run.outcomes[1].start_s >= 0.05
    assert max(outcome.waited_s for outcome in run.outcomes.values()) >= 0.005
    assert run.duration_s >= 0.11


def test_a_failure_is_one_requests():
    _, run = played(["x", "fail", "x"])
    assert [run.outcomes[i].success for i in range(3)] == [True, False, True]
    assert run.outcomes[1].error == "no"
    assert not run.cut_off


def test_an_interrupt_keeps_what_is_done():
    backend, run = played(["x", "hang", "x"], arrivals_s=[0.0, 0.0, 100.0], cancel_s=0.3)
    assert run.cut_off
    assert backend.open == 0
    assert run.outcomes[0].success
    assert run.outcomes[1].error == CUT_OFF
    assert 2 not in run.outcomes
