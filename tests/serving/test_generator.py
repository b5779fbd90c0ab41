"""Generation without a listener: messages in batches, cancelling, what an observer is told."""

import asyncio

import pytest

from loong_jax.types import FinishReason
from serving.client import generate_request
from serving.errors import DuplicateRequest, InvalidField, QueueFull, Refusal, UnknownRequest
from serving.generator import Admitted
from serving.proto.loong.v1 import loong_pb2 as pb
from tests.support.fake_engine import FakeManager, echo
from tests.support.live_server import Live, eventually, live_server

PROMPT = [5, 6, 7]


class Told:
    """An observer of everything; of one choice, too."""

    def __init__(self):
        self.streams, self.refusals, self.events = [], [], []

    def stream(self, request, arrived_us, num_prompt_tokens):
        self.streams.append((arrived_us, num_prompt_tokens))
        return self

    def refused(self, refusal):
        self.refusals.append(refusal)

    def prefilled(self, now_us):
        self.events.append(("prefilled", now_us))

    def emitted(self, num_tokens, now_us):
        self.events.append((num_tokens, now_us))

    def ended(self, reason, num_tokens):
        self.events.append((reason, num_tokens))


class Gathered:
    def __init__(self):
        self.admitted: list[Admitted] = []
        self.batches: list[list[pb.GenerateResponse]] = []

    async def admit(self, admitted):
        self.admitted.append(admitted)

    async def write(self, messages):
        self.batches.append(messages)

    @property
    def token_ids(self):
        return [token for batch in self.batches for message in batch for token in message.tokens.token_ids]


async def generate(live: Live, *, observer=None, **fields) -> Gathered:
    gathered = Gathered()
    live.server.generator.observers.add(observer)
    await live.server.generator.generate(generate_request(PROMPT, **fields), gathered.admit, gathered.write)
    return gathered


def test_the_last_tokens_come_with_the_finish_and_the_observer_hears_of_all():
    async def run():
        async with live_server() as live:
            told = Told()
            gathered = await generate(live, observer=told, max_tokens=5, request_id="r")
            assert gathered.token_ids == echo(PROMPT, 5)
            assert (gathered.admitted[0].request_id, list(gathered.admitted[0].token_ids)) == ("r", PROMPT)
            assert [message.WhichOneof("event") for message in gathered.batches[-1]] == ["tokens", "finished"]
            ((arrived_us, num_prompt_tokens),) = told.streams
            assert num_prompt_tokens == 3
            first, *middle, last = told.events
            assert first[0] == "prefilled"
            assert first[1] >= arrived_us
            assert sum(num_tokens for num_tokens, _ in middle) == 5
            assert last == (FinishReason.LENGTH, 5)

    asyncio.run(run())


def test_cancelled_at_any_point_it_aborts_and_its_name_is_free_again():
    async def run():
        async with live_server(step_s=0.002) as live:
            told = Told()
            task = asyncio.create_task(generate(live, observer=told, max_tokens=2000, request_id="r"))
            await eventually(lambda: len(live.manager.running) == 1)
            with pytest.raises(DuplicateRequest):
                await generate(live, observer=told, request_id="r")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: not live.manager.running)
            assert told.events[-1][0] is FinishReason.ABORT
            with pytest.raises(UnknownRequest):
                live.server.generator.abort("r")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("manager", "fields", "kind"),
    [(FakeManager(), {"n": 65}, InvalidField), (FakeManager(max_waiting=0), {}, QueueFull)],
)
def test_refusals_are_raised_and_counted_and_nothing_ends(manager, fields, kind):
    async def run():
        async with live_server(manager=manager) as live:
            told = Told()
            with pytest.raises(Refusal) as error:
                await generate(live, observer=told, **fields)
            assert [type(refusal) for refusal in (error.value, *told.refusals)] == [kind, kind]
            assert not told.events

    asyncio.run(run())


def test_while_the_queue_is_known_to_be_full_nothing_is_handed_in():
    async def run():
        async with live_server(manager=FakeManager(max_waiting=0)) as live:
            told = Told()
            live.server.generator.observers.add(told)
            gathered, request = Gathered(), generate_request(PROMPT)
            for _ in range(3):
                with pytest.raises(QueueFull, match="0 requests wait"):
                    await live.server.generator.generate(request, gathered.admit, gathered.write)
            assert len(told.streams) == 1, "the first one only"
            assert len(told.refusals) == 3

    asyncio.run(run())
