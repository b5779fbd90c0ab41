"""The way from the engine's thread to sinks: order, who goes first, handfuls."""

import asyncio

from serving.outbox import Outbox


class Told:
    def __init__(self, name, told):
        self.name, self.told = name, told

    def put(self, item, now_us):
        self.told.append((self.name, item, now_us))


def test_all_comes_in_order_first_things_first_and_others_get_a_turn():
    told, turns = [], []

    async def run():
        outbox = Outbox(asyncio.get_running_loop())
        old, new = Told("old", told), Told("new", told)
        for number in range(100):
            outbox.push(old, number, number)
        outbox.push(new, "first", 7, first=True)
        outbox.push(new, "second", 8)
        outbox.flush()
        outbox.flush()
        while len(told) < 102:
            turns.append(len(told))
            await asyncio.sleep(0)

    asyncio.run(run())
    assert told[0] == ("new", "first", 7)
    assert told[1:101] == [("old", number, number) for number in range(100)]
    assert told[101] == ("new", "second", 8)
    assert len(set(turns)) > 3, "between handfuls, others run"


def test_a_closed_loop_takes_nothing():
    asyncio_loop = asyncio.new_event_loop()
    outbox = Outbox(asyncio_loop)
    asyncio_loop.close()
    outbox.push(Told("gone", []), 1, 1)
    outbox.flush()
    outbox.flush()
