"""Replay an event log: the same events must give the same commands, byte for byte.

    python scripts/replay.py LOG [--describe]

Builds the manager that the log's header names, feeds it every event at its time, and compares the digest of its
commands with the recorded one. Exit code 0: all equal. 1: they differ, or the manager stopped on a bug of ours; the
event and the manager's state are printed. 2: the file is no event log, or names a policy that this version lacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loong_jax import __version__, codec
from loong_jax.cost.fitted import FittedCost
from loong_jax.eventlog import EventLogError, LogFrame, read_event_log
from loong_jax.issue import PlanError
from loong_jax.ledger import InvariantError
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import AnyCommand


def replay(path: Path, *, describe: bool) -> int:
    header, frames = read_event_log(path)
    if header.version != __version__:
        print(f"{path}: written by version {header.version}, replayed by {__version__}", file=sys.stderr)
    if header.policy not in POLICIES:
        raise EventLogError(f"{path}: policy {header.policy!r} is not one of {', '.join(POLICIES)}")
    policy = POLICIES[header.policy](header.cluster, header.limits)
    manager = Manager(header.cluster, header.limits, policy, FittedCost(header.coefficients, header.cluster.ladder))
    num_events = num_commands = 0
    for frame in frames:
        try:
            commands = manager.handle(frame.event, frame.now_us)
        except (PlanError, InvariantError) as error:
            print(f"event {num_events} at {frame.now_us} us: {_short(frame.event)}\n{type(error).__name__}: {error}")
            print(f"state after it:\n{manager.describe()}")
            return 1
        if codec.digest(commands) != frame.commands_digest:
            _report(num_events, frame, commands, manager)
            return 1
        num_events += 1
        num_commands += len(commands)
    if describe:
        print(manager.describe())
    print(f"{path}: {num_events} events, {num_commands} commands, all bytes equal")
    return 0


def _report(index: int, frame: LogFrame, commands: Sequence[AnyCommand], manager: Manager) -> None:
    print(f"event {index} at {frame.now_us} us: {_short(frame.event)}")
    print(f"commands differ; the log has digest {frame.commands_digest.hex()}, this replay issues:")
    for command in commands:
        print(f"  {_short(command)}")
    print(f"state after it:\n{manager.describe()}")


def _short(record: object) -> str:
    text = repr(record)
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay an event log and compare its commands byte for byte.")
    parser.add_argument("log", type=Path)
    parser.add_argument("--describe", action="store_true", help="print the manager's state at the end")
    args = parser.parse_args()
    try:
        return replay(args.log, describe=args.describe)
    except (EventLogError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
