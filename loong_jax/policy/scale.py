"""Scaling of decode groups: rows to groups, groups to masters, an instance more when memory is short (LoongServe 5.4).

Scaling down costs nothing, because a prefill leaves KV where decoding wants it (`placement.py`); scaling up moves
nothing, because an instance with no page of a row can serve as its master.
What it is not: an eviction; a row that finds no page anywhere is noted in the draft, and the policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.cost import CostModel
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import Group, members
from loong_jax.types import Phase, PlannedDecode, PlannedDecodeRow, RequestView

STALL = 0.1
"""What a second's wait within its token time costs a row, as a share of what one beyond it would."""


class DecodeGroup:
    """Decode rows whose KV ties them together. `need`: where that is; `group`: what will serve them, if READY."""

    __slots__ = ("_in_flight", "_kv_tokens", "group", "need", "rows")

    def __init__(self, need: int, group: Group | None, rows: list[RequestView]) -> None:
        self.need = need
        self.group = group
        self.rows = rows
        self._kv_tokens = -1
        self._in_flight: bool | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a step of it is under way (or of a row that joined it)."""
        if self._in_flight is None:
            self._in_flight = any([row.in_flight for row in self.rows])
        return self._in_flight

    @property
    def targeted(self) -> bool:
        """Whether a row names the time it wants between tokens."""
        return any(row.target.tpot_us for row in self.rows)

    @property
    def kv_tokens(self) -> int:
        """KV that a step reads on the fullest instance."""
        if self._kv_tokens < 0:
            held = dict.fromkeys(members(self.mask), 0)
            for row in self.rows:
                for instance, tokens in row.kv.items():
                    held[instance] += tokens
            self._kv_tokens = max(held.values(), default=0)
        return self._kv_tokens

    def step_s(self, cost: CostModel) -> float:
        """Predicted seconds of a step, rows spread over masters as even as may be."""
        dop, rows = self.mask.bit_count(), len(self.rows)
        return cost.decode_s(dop, rows, -(-rows // dop), self.kv_tokens)

    @property
    def mask(self) -> int:
        return self.group.mask if self.group is not None else self.need


class DecodePlanner:
    """`groups`: what `decoding` needs, before anything is planned; the draft's `load` counts their rows."""

    def __init__(self, draft: Draft, decoding: Sequence[RequestView]) -> None:
        self.draft = draft
        self.groups = self._decode_groups(decoding)

    def _decode_groups(self, decoding: Sequence[RequestView]) -> list[DecodeGroup]:
        """Rows that share an instance are served together, as far as a READY group spans them all."""
        out: list[DecodeGroup] = []
        joins: dict[int, DecodeGroup] = {}  # what rows that need these instances join
        for request in decoding:
            need = 0
            for instance in request.kv:
                need |= 1 << instance
            if not need:
                need = 1 << self._emptiest()
            group = joins.get(need)
            if group is not None:  # the common case
                group.rows.append(request)
                continue
            group = next((group for group in out if group.need & need == need), None)
            if group is not None:
                group.rows.append(request)
            else:
                group = DecodeGroup(need, self.draft.ready.smallest(Phase.DECODE, need, self.draft.alive), [request])
                if group.group is None and not self.draft.want(Phase.DECODE, need, 1):
                    self.draft.stuck.append(request)
                out.append(group)
                if self._merge(out, group):
                    joins.clear()
            joins[need] = group
        mean = self.draft.view.mean_output
        for group in out:
            if group.group is not None and group.group.mask != group.need:
                self.draft.want(Phase.DECODE, group.need, len(group.rows))
            for instance in members(group.mask):
                self.draft.load[instance] += len(group.rows)
                self.draft.stall[instance] += STALL * len(group.rows) / mean
        # Groups that overlap and cannot merge take turns.
        out.sort(key=lambda group: (min([row.in_flight for row in group.rows]), group.rows[0].request))
        return out

    def _emptiest(self) -> int:
        return max(members(self.draft.alive), key=lambda i: (self.draft.free[i], -i))

    def _merge(self, out: list[DecodeGroup], group: DecodeGroup) -> bool:
        """Take in the groups that `group` overlaps, where a READY group spans both; whether there was one."""
        before, merged = len(out), True
        while merged:
            merged = False
            for other in out:
                if other is group or not other.mask & group.mask:
                    continue
                cover = self.draft.ready.smallest(Phase.DECODE, group.need | other.need, self.draft.alive)
                if cover is not None:
                    out.remove(other)
                    group.need |= other.need
                    group.group = cover
                    group.rows = sorted(group.rows + other.rows, key=lambda row: row.request)
                    merged = True
                    break
        return len(out) < before

    @property
    def mask(self) -> int:
        """Instances of all groups."""
        mask = 0
        for group in self.groups:
            mask |= group.mask
        return mask

    def plan(self) -> list[PlannedDecode]:
        """A step for each group whose instances can take one, and that has a row to serve."""
        out: list[PlannedDecode] = []
        for group in list(self.groups):
            if group not in self.groups or group.group is None or not self._may_run(group):
                continue  # joined another on the way, or has to wait
            rows, needy = self._masters(group.group, group.rows)
            if needy:
                self._scale_up(group, len(needy))
                if not self._may_run(group):
                    continue
                rows, needy = self._masters(group.group, group.rows)
                if needy:
                    self.draft.block(needy[0])
            if rows:
                out.append(PlannedDecode(group.group.instances, tuple(rows)))
                self.draft.taken |= group.mask
        return out

    def _may_run(self, group: DecodeGroup) -> bool:
        draft = self.draft
        if (draft.lean or group.mask & draft.held) and group.mask & ~draft.idle:
            return False  # the place behind the step under way is kept for a prefill that will want several of them
        return group.mask & ~(draft.room & ~draft.taken) == 0

    def _masters(self, group: Group, rows: Sequence[RequestView]) -> tuple[list[PlannedDecodeRow], list[RequestView]]:
        """A master per row: the holder of its open page, else the holder with the fewest rows that has a free page,
        else any other member. Also the rows that find no page in the group; the oldest are served first."""
        instances, bucket, free = group.instances, group.bucket, self.draft.free
        if len(instances) == 1 and len(rows) <= free[instances[0]]:
            return on_one(instances[0], rows)[:bucket], []
        out: list[PlannedDecodeRow] = []
        needy: list[RequestView] = []
        counts, used = dict.fromkeys(instances, 0), dict.fromkeys(instances, 0)
        for row in rows:
            device = row.device_group
            open_page = row.open_page
            if open_page is not None:
                master = open_page[0]
                if counts[master] >= bucket or (device and master not in device):
                    continue
            else:
                spare = [i for i in instances if free[i] > used[i]]
                if not spare:
                    needy.append(row)
                    continue
                spare = [i for i in spare if counts[i] < bucket and (not device or i in device)]
                if not spare:
                    continue  # waits for the host, or for rows to leave
                held = row.kv
                master = min(spare, key=lambda i: (i not in held, counts[i], -free[i], i))
                used[master] += 1
            counts[master] += 1
            out.append(PlannedDecodeRow(row.request, master))
        return out, needy

    def _scale_up(self, group: DecodeGroup, num_pages: int) -> None:
        """Instances more, for their free pages: nothing moves. The smallest group that has enough, or that has most."""
        assert group.group is not None
        best, most = group.group, sum(self.draft.free[i] for i in group.group.instances)
        for wider in self.draft.ready.covering(Phase.DECODE, group.mask, self.draft.alive):
            free = sum(self.draft.free[i] for i in wider.instances)
            if free > most:
                best, most = wider, free
            if most >= num_pages:
                break
        if best is not group.group:
            group.group, group.need = best, best.mask
            self._merge(self.groups, group)


def on_one(instance: int, rows: Sequence[RequestView]) -> list[PlannedDecodeRow]:
    """Of the rows, all of whose KV it holds, those that need not wait for the host."""
    out: list[PlannedDecodeRow] = []
    for row in rows:
        device = row.device_group
        if not device or instance in device:
            out.append(PlannedDecodeRow(row.request, instance))
    return out
