"""The virtual clock and what will happen on it: a heap ordered by time, then by the order of insertion.

What it is not: aware of what the items mean (`driver.py`).
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")

NEVER_US = 1 << 62


class Timeline(Generic[T]):
    """Items at equal times come out in the order in which they went in: a run is a function of its inputs."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, at_us: int, item: T) -> None:
        heapq.heappush(self._heap, (at_us, self._next, item))
        self._next += 1

    def pop(self) -> tuple[int, T]:
        at_us, _, item = heapq.heappop(self._heap)
        return at_us, item

    @property
    def next_us(self) -> int:
        """When the next item is due; NEVER_US without one."""
        return self._heap[0][0] if self._heap else NEVER_US
