"""The event log and its replay: all that swayed a decision is in the file, also when the file was cut short."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

import msgspec
import pytest

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.eventlog import EventLogError, EventLogWriter, LogHeader, read_event_log
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import (
    AnyEvent,
    Arrived,
    CostUpdated,
    PrefillRow,
    ProgramReady,
    RunDecode,
    RunPrefill,
    StepDone,
    Tick,
)
from tests.support.schedules import arcs

ROOT = Path(__file__).parents[2]
CLUSTER = ClusterConfig(
    num_instances=2, page_tokens=4, pages_per_instance=16, ring_tokens=16, query_tile_tokens=16, slots=4,
    ladder=LadderConfig(dops=(1, 2), prefill_tokens=(16,), decode_rows=(4,)),
)  # fmt: skip
HEADER = LogHeader("0.1.0", CLUSTER, LimitsConfig(), "elastic", dict(unmeasured(prefill_base_s=0.001).coefficients))


def write_log(path: Path, tamper: int | None = None) -> list[tuple[int, AnyEvent]]:
    """A log of a short run. `tamper`: index of an event whose commands are not written down as they were."""
    cost = FittedCost(HEADER.coefficients, CLUSTER.ladder)
    manager = Manager(CLUSTER, HEADER.limits, POLICIES[HEADER.policy](CLUSTER, HEADER.limits), cost)
    writer = EventLogWriter(path, HEADER)
    pending: list[AnyEvent] = [ProgramReady(program, instances) for program, instances in arcs(CLUSTER)]
    pending += [CostUpdated({"decode_master_row_s.1": 0.5, "decode_base_s.1": 0.25})]
    pending += [Arrived(r, array("i", range(1, 11)).tobytes(), 3) for r in range(3)]
    events: list[tuple[int, AnyEvent]] = []
    while pending:
        event = pending.pop(0)
        events.append((len(events) * 10, event))
        commands = manager.handle(event, events[-1][0])
        for command in commands:
            if isinstance(command, RunPrefill | RunDecode):
                emitting = [row for row in command.rows if not isinstance(row, PrefillRow) or row.emit]
                pending.append(StepDone(command.step, (5,) * len(emitting), (-0.5,) * len(emitting)))
        writer.write(events[-1][0], event, commands if tamper != len(events) - 1 else commands[:-1])
    writer.close()
    assert not manager.state.requests
    return events


def test_round_trip(tmp_path: Path) -> None:
    events = write_log(tmp_path / "log")
    header, frames = read_event_log(tmp_path / "log")
    assert header == HEADER
    assert [(frame.now_us, frame.event) for frame in frames] == events


def test_cut_short(tmp_path: Path) -> None:
    events = write_log(tmp_path / "log")
    data = (tmp_path / "log").read_bytes()
    for cut in (1, 3, 5, 17):
        (tmp_path / "cut").write_bytes(data[:-cut])
        _, frames = read_event_log(tmp_path / "cut")
        assert [(frame.now_us, frame.event) for frame in frames] == events[:-1]


def test_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"\x05\x00\x00\x00hello")
    for name in ("empty", "other"):
        with pytest.raises(EventLogError, match=name):
            read_event_log(tmp_path / name)


def run_replay(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/replay.py", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_replay_script(tmp_path: Path) -> None:
    events = write_log(tmp_path / "log")
    done = run_replay(tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(events)} events" in done.stdout


def test_replay_finds_the_first_difference(tmp_path: Path) -> None:
    events = write_log(tmp_path / "probe")
    tampered = next(index for index, (_, event) in enumerate(events) if isinstance(event, StepDone))
    write_log(tmp_path / "log", tamper=tampered)
    done = run_replay(tmp_path / "log")
    assert done.returncode == 1
    assert f"event {tampered} at" in done.stdout
    assert "instance 0" in done.stdout  # describe()


def test_replay_tells_where_the_manager_stopped(tmp_path: Path) -> None:
    writer = EventLogWriter(tmp_path / "log", HEADER)
    writer.write(10, Tick(), ())
    writer.write(5, Tick(), ())  # the clock runs back
    writer.close()
    done = run_replay(tmp_path / "log")
    assert done.returncode == 1
    assert "event 1 at 5 us" in done.stdout
    assert "INV-3" in done.stdout


def test_replay_refuses_other_policies(tmp_path: Path) -> None:
    EventLogWriter(tmp_path / "log", msgspec.structs.replace(HEADER, policy="unheard_of")).close()
    done = run_replay(tmp_path / "log")
    assert done.returncode == 2
    assert "unheard_of" in done.stderr
