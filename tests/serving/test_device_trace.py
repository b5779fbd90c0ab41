"""Profiles: one at a time, below the operator's folder, over by themselves; a real one on CPU."""

import asyncio

import pytest

from serving.device_trace import DeviceTrace
from serving.errors import NotPossible


class Profiler:
    def __init__(self):
        self.folders, self.stops, self.breaks = [], 0, False

    def start(self, folder):
        if self.breaks:
            raise RuntimeError("busy")
        self.folders.append(folder)

    def stop(self):
        if self.breaks:
            raise RuntimeError("disk full")
        self.stops += 1


def traced(tmp_path):
    profiler = Profiler()
    return profiler, DeviceTrace(tmp_path / "profiles", profiler.start, profiler.stop)


def test_one_at_a_time_with_names_of_their_own(tmp_path):
    async def run():
        profiler, trace = traced(tmp_path)
        first = await trace.start(60)
        with pytest.raises(NotPossible, match=first):
            await trace.start(60)
        assert await trace.stop() == first
        with pytest.raises(NotPossible, match="no profile"):
            await trace.stop()
        second = await trace.start(60)
        await trace.close()
        await trace.close()
        assert first != second
        assert profiler.folders == [tmp_path / "profiles" / name for name in (first, second)]
        assert all(folder.is_dir() for folder in profiler.folders)
        assert profiler.stops == 2

    asyncio.run(run())


def test_a_forgotten_one_ends(tmp_path):
    async def run():
        profiler, trace = traced(tmp_path)
        await trace.start(0.02)
        for _ in range(500):
            if profiler.stops:
                break
            await asyncio.sleep(0.01)
        assert profiler.stops == 1
        await trace.start(60)
        await trace.stop()

    asyncio.run(run())


def test_what_goes_wrong_is_said_and_leaves_no_profile(tmp_path):
    async def run():
        profiler, trace = traced(tmp_path)
        profiler.breaks = True
        with pytest.raises(NotPossible, match="RuntimeError: busy"):
            await trace.start(60)
        profiler.breaks = False
        await trace.start(60)
        profiler.breaks = True
        with pytest.raises(NotPossible, match="disk full"):
            await trace.stop()
        with pytest.raises(NotPossible, match="no profile"):
            await trace.stop()
        with pytest.raises(NotPossible, match="--profile-dir"):
            await DeviceTrace(None).start(60)

    asyncio.run(run())


@pytest.mark.slow
def test_a_real_profile_is_written(tmp_path):
    async def run():
        trace = DeviceTrace(tmp_path)
        name = await trace.start(60)
        assert await trace.stop() == name
        assert list((tmp_path / name).rglob("*.xplane.pb"))

    asyncio.run(run())
