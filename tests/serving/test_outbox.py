"""The way from the engine's thread to sinks: order, who goes first, handfuls."""

import asyncio

from loong_jax.types import Emit
from serving.outbox import Mailbox, Outbox, Prefilled


class Told:
    def __init__(self, told):
        self.told = told

    def put(self, item, now_us):
        self.told.append((self, item, now_us))


def emit(number: int) -> Emit:
    return Emit(0, number, (1,), (0.0,), 1)


def new_boxes(told, count: int) -> list[Mailbox]:
    return [Mailbox(Told(told)) for _ in range(count)]


def test_each_sink_gets_all_of_its_own_in_order():
    told = []

    async def run():
        outbox = Outbox(asyncio.get_running_loop())
        boxes = new_boxes(told, 3)
        for number in range(30):
            outbox.push(boxes[number % 3], emit(number), number)
            outbox.flush()
        await asyncio.sleep(0)
        return boxes

    boxes = asyncio.run(run())
    assert [sink for sink, _, _ in told] == [box.sink for box in boxes for _ in range(10)]
    for place, box in enumerate(boxes):
        assert [(item.index, now_us) for sink, item, now_us in told if sink is box.sink] == [
            (number, number) for number in range(place, 30, 3)
        ]


def test_first_tokens_pass_others_and_wait_for_no_handful():
    told, turns = [], []

    async def run():
        outbox = Outbox(asyncio.get_running_loop())
        boxes, new = new_boxes(told, 100), Mailbox(Told(told))
        for _ in range(2):  # the first time they are new themselves
            for box in boxes:
                outbox.push(box, emit(0), 0)
            outbox.flush()
            if not turns:
                while len(told) < 100:
                    await asyncio.sleep(0)
            turns.append(len(told))
        await asyncio.sleep(0)
        assert 100 < len(told) < 130, "a handful"
        before = len(told)
        outbox.push(new, Prefilled(1, 3, True), 7)
        outbox.push(new, emit(0), 8)
        outbox.push(boxes[0], emit(1), 9)
        outbox.flush()
        await asyncio.sleep(0)
        assert [entry[2] for entry in told[before : before + 2]] == [7, 8]
        outbox.push(new, emit(1), 10)
        while len(told) < 204:
            turns.append(len(told))
            await asyncio.sleep(0)

    asyncio.run(run())
    assert [now_us for _, _, now_us in told[-2:]] == [9, 10], "what is not first has its turn behind the others"
    assert len(set(turns)) > 5, "between handfuls, others run"


def test_the_further_behind_the_larger_the_handful():
    told = []

    async def run():
        outbox = Outbox(asyncio.get_running_loop())
        boxes = new_boxes(told, 100)
        for number in range(50):
            for box in boxes:
                outbox.push(box, emit(number), number)
        outbox.flush()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert len(told) == 5000


def test_what_is_pushed_while_its_sink_is_told_is_told_too():
    class Asks(Told):
        def put(self, item, now_us):
            super().put(item, now_us)
            if item.index < 3:
                outbox.push(box, emit(item.index + 1), 0)
                outbox.flush()

    told = []

    async def run():
        nonlocal outbox, box
        outbox, box = Outbox(asyncio.get_running_loop()), Mailbox(Asks(told))
        outbox.push(box, emit(0), 0)
        outbox.flush()
        for _ in range(5):
            await asyncio.sleep(0)

    outbox = box = None
    asyncio.run(run())
    assert [item.index for _, item, _ in told] == [0, 1, 2, 3]


def test_a_closed_loop_takes_nothing():
    asyncio_loop = asyncio.new_event_loop()
    outbox = Outbox(asyncio_loop)
    asyncio_loop.close()
    outbox.push(Mailbox(Told([])), emit(0), 1)
    outbox.flush()
    outbox.flush()
