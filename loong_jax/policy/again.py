"""The last decision again: where nothing but decoding went on, each group's next step has the rows and masters of the
one before.

What it is: decode steps kept by `View.version`, with what must still hold: room on every member, and a free page for
each row that may need one. (A row that comes to its end, or to another group, is a new version.)
What it is not: a way to plan; whatever is not kept here is planned anew (`elastic.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from loong_jax.policy.draft import MAX_QUEUED_STEPS
from loong_jax.policy.groups import mask_of
from loong_jax.policy.scale import DecodeGroup, on_one
from loong_jax.types import InstanceView, Plan, PlannedDecode

NOTHING = Plan()


class _Kept:
    __slots__ = ("last", "mask", "pages", "plan", "step")

    def __init__(self, step: PlannedDecode) -> None:
        self.step = step
        self.plan = Plan(decodes=(step,))
        self.last = Plan(decodes=(step,), final=True)
        self.mask = mask_of(step.instances)
        self.pages = tuple(Counter(row.master for row in step.rows).items())


class Again:
    def __init__(self) -> None:
        self._version: int | None = None
        self._kept: dict[int, _Kept] = {}
        self._lean = False
        self._missing = 0  # instances of groups without a step to take again

    def plan(self, version: int, instances: Sequence[InstanceView]) -> Plan | None:
        """What to do now; None when it must be planned."""
        if version != self._version:
            return None
        room = idle = 0
        for instance in instances:
            if instance.alive and instance.queued < MAX_QUEUED_STEPS:
                room |= 1 << instance.instance
                if not instance.queued:
                    idle |= 1 << instance.instance
        if room & self._missing:
            return None
        able = idle if self._lean else room
        ready = [kept for kept in self._kept.values() if not kept.mask & ~able]
        for kept in ready:
            if any(instances[master].free_pages < pages for master, pages in kept.pages):
                return None
        if len(ready) == 1:
            return ready[0].plan if ready[0].mask & idle and not self._lean else ready[0].last
        return Plan(decodes=tuple([kept.step for kept in ready])) if ready else NOTHING

    def keep(
        self, version: int, groups: Sequence[DecodeGroup], steps: Sequence[PlannedDecode], lean: bool = False
    ) -> None:
        """Nothing waits for prefill, and these steps of these groups were planned; `lean`: no second one is queued."""
        self._lean = lean
        if version != self._version:
            self._version, self._kept = version, {}
        if any(a.mask & b.mask for a, b in combinations(groups, 2)):
            self._version = None  # they take turns
            return
        planned = {mask_of(step.instances): step for step in steps}
        self._missing = 0
        for group in groups:
            step = planned.get(group.mask) or _only_step(group)
            if step is not None and len(step.rows) == len(group.rows):
                self._kept[group.mask] = _Kept(step)
            elif step is not None or group.mask not in self._kept:
                self._kept.pop(group.mask, None)
                self._missing |= group.mask


def _only_step(group: DecodeGroup) -> PlannedDecode | None:
    """What a group will do next, where that is no choice: it has one instance."""
    if group.group is None or group.group.dop > 1 or len(group.rows) > group.group.bucket:
        return None
    rows = on_one(group.group.instances[0], group.rows)
    return PlannedDecode(group.group.instances, tuple(rows)) if len(rows) == len(group.rows) else None
