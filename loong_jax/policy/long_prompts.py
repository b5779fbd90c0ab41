"""A prompt of many chunks beside short ones: what it leaves them, how long its chunks last, when it gives way.

What it is: arithmetic over a view. A long prompt leaves a quarter of the instances where the usual prompt is content
with that, and then its chunks may last, because nobody waits for their end; else it leaves one, and others take their
turns between its chunks, on as many instances as they like.
What it is not: an order (`dispatch.py`); a long prompt starts when its turn comes, and ages like all others.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.cost import row_pairs
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import mask_of
from loong_jax.policy.times import Times
from loong_jax.types import RequestView

MANY_CHUNKS = 16
"""So many, alone on the largest group, make a prompt a long one."""
BRIEF = 0.25
"""Share of a chunk's time that the usual prompt may take on a quarter of the instances, to be content with them."""
UNDISTURBED = 4
"""A chunk that nobody will wait for may last so many times as long."""
GIVE_WAY = 0.5
"""A long prompt waits for one that began beside it, and would need more than this share of a chunk's time where it is:
that one takes more instances for its next chunk."""


class LongPrompts:
    """`lacking`: requests that have a place and lack KV."""

    def __init__(self, draft: Draft, times: Times, lacking: Sequence[RequestView]) -> None:
        self._draft, self._times, self._lacking = draft, times, lacking
        self._num_alive = draft.alive.bit_count()
        self._usual_s = draft.limits.chunk_us * 1e-6
        self._others_are_brief: bool | None = None
        self._homes = -1

    def is_long(self, request: RequestView) -> bool:
        return self._times.alone_s(request.known, 0) > MANY_CHUNKS * self._usual_s

    def most_instances(self, request: RequestView) -> int:
        """How many may compute it: all but those that it leaves, if a group of all the others can be formed."""
        alive, dops = self._num_alive, self._times.dops
        if not self.is_long(request):
            return alive
        if self.others_are_brief and alive - alive // 4 in dops:
            return alive - alive // 4
        return alive - 1 if alive - 1 in dops else alive

    def chunk_s(self, request: RequestView) -> float:
        """How long a chunk of it may last."""
        apart = self.others_are_brief and self.most_instances(request) < self._num_alive
        return UNDISTURBED * self._usual_s if apart else self._usual_s

    @property
    def others_are_brief(self) -> bool:
        """Whether a quarter of the instances serves the usual prompt soon."""
        if self._others_are_brief is None:
            self._others_are_brief = self._find_brief()
        return self._others_are_brief

    def _find_brief(self) -> bool:
        tokens, quarter = self._draft.view.usual_prompt, self._num_alive // 4
        if not tokens or not quarter:
            return False
        seconds = min(self._times.step_s(dop, tokens, row_pairs(tokens, 0), 0) for dop in range(1, quarter + 1))
        return seconds <= BRIEF * self._usual_s

    @property
    def homes(self) -> int:
        """Instances with KV of long prompts that are not through: rows that decode there stand in their way."""
        if self._homes < 0:
            self._homes = 0
            for request in self._lacking:
                if self.is_long(request):
                    self._homes |= mask_of(request.kv)
        return self._homes

    def under_way(self) -> bool:
        """Whether a chunk of one is being computed apart from the others: they are to find room at once."""
        if not self._lacking or not self.others_are_brief:
            return False
        return any(request.in_flight > 0 and self.is_long(request) for request in self._lacking)

    def gives_way(self, request: RequestView) -> RequestView | None:
        """A shorter prompt that began on few instances, for whose next chunk a long `request` leaves all of them."""
        if self.others_are_brief or not self.is_long(request):
            return None
        for other in self._lacking:
            if other is request or not other.kv or self.is_long(other):
                continue
            tokens, resident = sum(run.count for run in other.missing), sum(other.kv.values())
            seconds = self._times.step_s(max(1, len(other.kv)), tokens, row_pairs(tokens, resident), resident)
            if seconds > GIVE_WAY * self._usual_s:
                return other
        return None
