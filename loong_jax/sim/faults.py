"""What breaks in a simulation: seeded, and each counted.

Of steps: slow, failed (with all pools of their group); of completions: late, lost, twice; of the world: an instance
lost and joined again, aborts, stops, jumps of the clock, programs that are not READY, storms of arrivals.

The contract between a driver and the manager: each step is answered by a StepDone or a StepFailed. Answers may come in
any order, late, and twice; the clock is monotonic, so it only jumps forward. A completion that never comes is not the
manager's to find: a watchdog of the driver posts StepFailed `watchdog_us` after it was due, and gives up the pools of
its group. The live executor answers every step, because it waits for each; it has no watchdog for a device that hangs.
What it is not: a mistake in tokens or pages (the manager's invariants, and the mock executor of the tests).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import msgspec

from loong_jax.config import ConfigError
from loong_jax.sim.workloads import Request
from loong_jax.types import Program

Ready = tuple[Program, tuple[int, ...]]


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities: of a step (slow, fail), of a completion (late, lost, twice), of an event handled (abort, stop,
    lose, jump), of a program (unready), of a request (storm: it comes together with the one before)."""

    seed: int = 0
    p_slow: float = 0.0
    p_fail: float = 0.0
    p_late: float = 0.0
    p_lost: float = 0.0
    p_twice: float = 0.0
    p_abort: float = 0.0
    p_stop: float = 0.0
    p_lose: float = 0.0
    p_jump: float = 0.0
    p_unready: float = 0.0
    p_storm: float = 0.0
    slow_factor: float = 20.0
    late_us: int = 200_000
    watchdog_us: int = 2_000_000
    rejoin_us: int = 500_000
    jump_us: int = 60_000_000
    ready_us: int = 1_000_000

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.startswith("p_") and not 0 <= value <= 1:
                raise ConfigError(f"{field}: {value} is no probability")
            if field.endswith(("_us", "_factor")) and value < 1:
                raise ConfigError(f"{field}: must be at least 1")


class FaultPlan:
    """Draws the faults of one run, in the order in which it is asked. `counts`: how often each happened."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(f"faults {faults.seed}")

    def _happens(self, kind: str, probability: float) -> bool:
        if probability == 0 or self._rng.random() >= probability:
            return False
        self.counts[kind] += 1
        return True

    def stretch(self, seconds: float) -> float:
        """How long a step takes that should take `seconds`."""
        if not self._happens("slow", self.faults.p_slow):
            return seconds
        return seconds * self._rng.uniform(1, self.faults.slow_factor)

    def fails(self) -> bool:
        """Whether a step fails when it runs."""
        return self._happens("failed", self.faults.p_fail)

    def deliveries(self) -> list[int]:
        """After which times, in microseconds, the host hears of a completion: () when never."""
        faults = self.faults
        if self._happens("lost completion", faults.p_lost):
            return []
        first = self._rng.randint(1, faults.late_us) if self._happens("late", faults.p_late) else 0
        if self._happens("twice", faults.p_twice):
            return [first, first + self._rng.randint(0, faults.late_us)]
        return [first]

    def aborts(self) -> bool:
        return self._happens("abort", self.faults.p_abort)

    def stops(self) -> bool:
        return self._happens("stop", self.faults.p_stop)

    def loses(self) -> bool:
        return self._happens("lost instance", self.faults.p_lose)

    def rejoin_us(self) -> int:
        return self._rng.randint(1, self.faults.rejoin_us)

    def jump_us(self) -> int:
        """By how much the clock jumps now; mostly 0."""
        return self._rng.randint(1, self.faults.jump_us) if self._happens("clock jump", self.faults.p_jump) else 0

    def choose(self, among: Sequence[int]) -> int:
        return self._rng.choice(among)

    def ready(self, programs: Sequence[Ready]) -> tuple[list[Ready], list[tuple[int, Ready]]]:
        """(READY from the start, (when, which) later). As in the live engine, the steps of DoP 1 and of the largest are
        there on one set each; what is late may also be asked for."""
        largest = max((program.dop for program, _ in programs), default=1)
        first: dict[int, tuple[int, ...]] = {}
        for program, instances in programs:
            if program.dop in (1, largest):
                first.setdefault(program.dop, instances)
        now, later = [], []
        for program, instances in programs:
            if first.get(program.dop) != instances and self._happens("not ready", self.faults.p_unready):
                later.append((self._rng.randint(1, self.faults.ready_us), (program, instances)))
            else:
                now.append((program, instances))
        return now, later

    def storm(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The workload with some arrivals moved to the time of the one before."""
        out: list[Request] = []
        for request in requests:
            if out and self._happens("storm", self.faults.p_storm):
                request = msgspec.structs.replace(request, arrived_us=out[-1].arrived_us)
            out.append(request)
        return tuple(out)
