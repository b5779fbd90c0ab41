"""Readiness says the first reason that holds, everywhere; the watchdog finds work that does not go on."""

import asyncio

from grpc_health.v1 import health_pb2

from serving.health import Readiness, Reason, Watchdog
from serving.loop import Progress

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_the_first_reason_that_holds_is_told():
    async def run():
        told: list[str | None] = []
        readiness = Readiness(("s",), told.append)

        async def status(name: str):
            return (await readiness.servicer.Check(health_pb2.HealthCheckRequest(service=name), None)).status

        await readiness.announce()
        assert [await status(name) for name in ("", "s")] == [NOT_SERVING] * 2
        await readiness.holds(Reason.STALLED, "stalled")
        await readiness.is_over(Reason.WARMING)
        assert [await status(name) for name in ("", "s")] == [NOT_SERVING] * 2
        await readiness.is_over(Reason.STALLED)
        assert [await status(name) for name in ("", "s")] == [SERVING] * 2
        await readiness.is_over(Reason.STALLED)
        await readiness.holds(Reason.DRAINING, "draining")
        await readiness.holds(Reason.STALLED, "stalled")
        await readiness.is_over(Reason.STALLED)
        assert await status("") == NOT_SERVING, "a recovery does not undo a drain"
        await readiness.holds(Reason.LOST, "lost")
        warm = "the server is warming up"
        assert told == [warm, warm, "stalled", None, "draining", "draining", "draining", "lost"]

    asyncio.run(run())


class Engine:
    """A watchdog over progress that the test sets, looked at by the test's clock."""

    def __init__(self, stall_s: float = 2.0):
        self.progress = Progress(0, False, 0, 0)
        self.now_s = 0.0
        self.told: list[str] = []

        async def stalled(message: str) -> None:
            self.told.append(message)

        async def recovered() -> None:
            self.told.append("recovered")

        self.watchdog = Watchdog(
            lambda: self.progress, stalled, recovered, stall_s=stall_s, look_s=0.25, clock=lambda: self.now_s
        )

    async def looks(self, seconds: float, **changes) -> list[str]:
        self.progress = self.progress._replace(**changes)
        for _ in range(round(seconds / 0.25)):
            self.now_s += 0.25
            await self.watchdog.look()
        told, self.told = self.told, []
        return told


def test_a_thread_that_stands_still_is_found_and_its_recovery_too():
    async def run():
        engine = Engine()
        assert await engine.looks(100) == [], "with nothing to do it may be quiet"
        assert await engine.looks(2, busy=True) == []
        (told,) = await engine.looks(1)
        assert told.startswith("the engine stands still")
        assert await engine.looks(100) == [], "told once"
        assert await engine.looks(0.25, handled=1) == ["recovered"]
        assert await engine.looks(1.75) == []
        assert await engine.looks(1, busy=False) == []

    asyncio.run(run())


def test_a_busy_thread_is_no_stalled_one():
    async def run():
        engine = Engine()
        for handled in range(100):
            assert await engine.looks(0.25, busy=True, handled=handled, in_flight=2, steps_over=handled) == []

    asyncio.run(run())


def test_devices_that_do_not_answer_are_found_though_the_thread_ticks():
    async def run():
        engine = Engine()
        told = []
        for handled in range(20):
            told += await engine.looks(0.25, handled=handled, in_flight=3)
        (message,) = told
        assert message == "the devices stand still: no step has ended for 2 s, 3 are under way"
        assert await engine.looks(0.25, steps_over=1, in_flight=2) == ["recovered"]

    asyncio.run(run())


def test_time_in_which_nothing_ran_does_not_count():
    async def run():
        engine = Engine()
        await engine.looks(0.5, busy=True)
        engine.now_s += 3600
        assert await engine.looks(0.25) == []
        assert len(await engine.looks(1.5)) == 1

    asyncio.run(run())
