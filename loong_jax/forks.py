"""Children that go on from a parent's text: when they may start, and which of its pages they share (DESIGN 8).

What it is: functions on the manager's state, from a fork to commands. What it is not: pages (`ledger.py`), or admission
(`manager.py`).
"""

from __future__ import annotations

from loong_jax import kv_upkeep
from loong_jax.core_state import CoreState
from loong_jax.request_state import RequestState
from loong_jax.types import AnyCommand, CopyPages, Fork, Forked, PageCopy, Phase, Program


def child_of(state: CoreState, event: Forked, parent: RequestState) -> RequestState:
    """A request of its own, whose prompt is what it continues; keys that it shares are rotated for the parent's
    length."""
    if event.known > parent.known:
        raise ValueError(f"fork of {event.known} tokens of request {parent.id}, which has {parent.known}")
    return RequestState(
        state.ledger,
        event.child,
        state.now_us,
        parent.tokens[: event.known or parent.known],
        event.max_tokens,
        event.sampling,
        event.stop_ids,
        event.adjustment,
        rope_len=parent.rope_len,
        target=parent.target,
    )


def start_or_hold(state: CoreState, parent: RequestState, child: RequestState) -> list[AnyCommand]:
    """`child` is waiting. It starts now, is held until the parent's step that ends their common text is done, or, where
    there is no place, waits like any other and shares nothing: waiting requests hold no page."""
    if parent.known == child.known and not parent.num_generated:  # not even its first token is known
        state.held[child.id] = parent.id
        return []
    return _start(state, parent, child) if state.free_places > 0 else []


def release(state: CoreState) -> list[AnyCommand]:
    """Start the held children that may; those of a parent that ended now wait like any other request."""
    out: list[AnyCommand] = []
    for child_id, parent_id in list(state.held.items()):
        parent, child = state.requests.get(parent_id), state.requests[child_id]
        if parent is None:
            del state.held[child_id]
        elif parent.known > child.known and state.free_places > 0:
            del state.held[child_id]
            out += _start(state, parent, child)
    return out


def _start(state: CoreState, parent: RequestState, child: RequestState) -> list[AnyCommand]:
    state.start(child)
    out: list[AnyCommand] = []
    copy = Program(Phase.COPY, 1, state.cluster.ladder.move_pages)
    copy_on = frozenset(i for i in state.ledger.tokens(parent.id) if state.has_room(i) and (copy, (i,)) in state.ready)
    forked = state.ledger.fork(parent.id, child.id, child.known - 1, copy_on)
    child.dropped = parent.dropped
    useless = kv_upkeep.recount(state, child)
    if useless:  # what is lacking cannot be computed from it; nobody was told of it yet
        return out
    if forked.shared:
        out.append(Fork(parent.id, child.id, forked.shared))
    if forked.copied is not None:
        instance, src_page, dst_page, run = forked.copied
        child.last_master = instance
        step = state.open_step((instance,), (), (child.id,))
        out.append(CopyPages(step, instance, (PageCopy(child.id, src_page, dst_page, run),)))
    return out
