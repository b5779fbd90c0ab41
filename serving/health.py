"""Whether requests are taken, said the same everywhere: to the generator, to grpc.health.v1, to GET /health.

`Readiness` holds the reasons why not; `Watchdog` finds the engine standing still. What it is not: the life cycle
(`serving/launch.py`) or the reasons' meaning (`serving/server.py`).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from grpc_health.v1 import health, health_pb2

from serving.loop import Progress

_log = logging.getLogger(__name__)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Reason(enum.IntEnum):
    """Why no requests are taken; the first one that holds is told."""

    LOST = 0
    DRAINING = 1
    WARMING = 2
    STALLED = 3


class Readiness:
    """The reasons that hold. At first it is warming up. All methods belong to one asyncio loop."""

    def __init__(self, services: Sequence[str], tell: Callable[[str | None], None]) -> None:
        """`services`: names that the health service knows, besides "". `tell`: is given the reason at each change, None
        when requests are taken."""
        self.servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._names = ("", *services)
        self._tell = tell
        self._reasons: dict[Reason, str] = {Reason.WARMING: "the server is warming up"}

    @property
    def refusing(self) -> str | None:
        return self._reasons[min(self._reasons)] if self._reasons else None

    async def announce(self) -> None:
        """Say how it is now."""
        self._tell(self.refusing)
        for name in self._names:
            await self.servicer.set(name, _NOT_SERVING if self._reasons else _SERVING)

    async def holds(self, reason: Reason, message: str) -> None:
        self._reasons[reason] = message
        await self.announce()

    async def is_over(self, reason: Reason) -> None:
        if self._reasons.pop(reason, None) is not None:
            await self.announce()


class Watchdog:
    """Looks at an engine's progress a few times a second: work that does not go on for `stall_s` is a stall, and it is
    over with the next piece of work done."""

    def __init__(
        self,
        progress: Callable[[], Progress],
        on_stall: Callable[[str], Awaitable[None]],
        on_recovery: Callable[[], Awaitable[None]],
        *,
        stall_s: float,
        look_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._stall_s = stall_s
        self._look_s = look_s
        self._clock = clock
        self._seen: Progress | None = None
        self._looked_s = clock()
        self._thread_s = self._devices_s = 0.0  # without progress, while there was work
        self._stalled = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._look_s)
            await self.look()

    async def look(self) -> None:
        now_s, seen, new = self._clock(), self._seen, self._progress()
        # While this did not run, perhaps nothing did: a paused machine is no stalled engine.
        passed_s = min(now_s - self._looked_s, 4 * self._look_s)
        self._seen, self._looked_s = new, now_s
        if seen is None:
            return
        stands = seen.busy and new.busy and new.handled == seen.handled
        self._thread_s = self._thread_s + passed_s if stands else 0.0
        waits = seen.in_flight and new.in_flight and new.steps_over == seen.steps_over
        self._devices_s = self._devices_s + passed_s if waits else 0.0
        message = None
        if self._thread_s >= self._stall_s:
            message = f"the engine stands still: one event takes more than {self._stall_s:g} s"
        elif self._devices_s >= self._stall_s:
            message = (
                f"the devices stand still: no step has ended for {self._stall_s:g} s, {new.in_flight} are under way"
            )
        await self._turn(message)

    async def _turn(self, message: str | None) -> None:
        if message is not None and not self._stalled:
            self._stalled = True
            _log.error("%s", message)
            await self._on_stall(message)
        elif message is None and self._stalled:
            self._stalled = False
            _log.warning("the engine goes on")
            await self._on_recovery()
