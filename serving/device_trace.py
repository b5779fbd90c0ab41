"""Profiles of this process's devices, made by jax.profiler on request, below a folder that the operator chose.

What it is not: the cost profile of an engine (`serving/profile.py`). A profile ends by itself, so a forgotten one fills
no disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from serving.errors import NotPossible


def start_jax(folder: Path) -> None:
    import jax

    jax.profiler.start_trace(str(folder))


def stop_jax() -> None:
    import jax

    jax.profiler.stop_trace()


class DeviceTrace:
    """One profile at a time. All methods belong to one asyncio loop; what blocks runs in a thread."""

    def __init__(
        self,
        folder: Path | None,
        start: Callable[[Path], None] = start_jax,
        stop: Callable[[], None] = stop_jax,
    ) -> None:
        """`folder` None: no profiles. `start` and `stop` are jax.profiler's."""
        self._folder = folder
        self._start = start
        self._stop = stop
        self._name: str | None = None
        self._changing = asyncio.Lock()
        self._end: asyncio.Task[None] | None = None
        self._count = 0

    async def start(self, duration_s: float) -> str:
        """Begin one that ends after `duration_s`, unless it is stopped before; its name. Raises NotPossible."""
        if self._folder is None:
            raise NotPossible("profile-dir: the server was started without --profile-dir FOLDER")
        async with self._changing:
            if self._name is not None:
                raise NotPossible(f"a profile is under way: {self._name}")
            self._count += 1
            name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{self._count}"
            try:
                await asyncio.to_thread(self._begin, self._folder / name)
            except Exception as error:  # of the disk, or of the profiler
                raise NotPossible(f"the profile does not start: {type(error).__name__}: {error}") from None
            self._name = name
            self._end = asyncio.create_task(self._end_after(duration_s, name))
            return name

    async def stop(self) -> str:
        """End the profile under way and write it; its name. Raises NotPossible."""
        async with self._changing:
            name, self._name = self._name, None
            if name is None:
                raise NotPossible("no profile is under way")
            if self._end is not None and self._end is not asyncio.current_task():
                self._end.cancel()
            try:
                await asyncio.to_thread(self._stop)
            except Exception as error:
                raise NotPossible(f"the profile is not written: {type(error).__name__}: {error}") from None
            return name

    async def close(self) -> None:
        if self._name is not None:
            await self.stop()

    def _begin(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._start(folder)

    async def _end_after(self, duration_s: float, name: str) -> None:
        await asyncio.sleep(duration_s)
        if self._name == name:
            await self.stop()
