"""What becomes of the KV of requests besides being computed and moved: lost, rolled back, passed by windows.

What it is: changes of the ledger, each with the commands that tell the executor. Where every layer has a window
(`ClusterConfig.kv_window`), pages wholly before it are dropped as a request goes on. What was dropped is not missing,
as long as everything after it is there; a gap that needs dropped KV to be computed again sends the request back to its
first token, because a position depends, through the layers, on all before it.
What it is not: the decision when (`manager.py`), the evictions of a plan (`issue.py`), or sharing (`forks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from loong_jax.core_state import CoreState, Step
from loong_jax.request_state import RequestState
from loong_jax.types import AnyCommand, Free, Slide, Truncate


def slide(state: CoreState, request: RequestState) -> list[Slide]:
    """Drop the pages that every layer's window has passed. Called whenever that may be a page or more."""
    window = state.cluster.kv_window
    start = request.read_from(window) if window else 0
    if start < request.dropped + state.cluster.page_tokens:
        return []
    request.dropped = state.ledger.slide(request.id, start)
    return [Slide(request.id, start)]


def lose(state: CoreState, instances: Iterable[int]) -> list[AnyCommand]:
    """The pools of `instances` are gone."""
    out: list[AnyCommand] = []
    gone = sorted(instances)
    state.changes += 1
    for request_id in list(state.active):
        request = state.requests[request_id]
        # The newest token is lost there too: no row may be fed from it.
        request.sampled_on = tuple(i for i in request.sampled_on if i not in gone)
        held = state.ledger.tokens(request_id)
        lost = tuple(i for i in gone if i in held)
        if lost:
            state.ledger.free(request_id, lost)
            out.append(Free(request_id, tuple(sorted({*lost, *recount(state, request)}))))
    return out


def settle(state: CoreState, step: Step) -> list[AnyCommand]:
    """A request with nothing in flight but tokens issued lost them in a failure: it goes on from what is known."""
    out: list[AnyCommand] = []
    for request_id in step.requests:
        request = state.requests.get(request_id)
        if request is None or request.steps or request.issued == len(request.tokens):
            continue
        known = len(request.tokens)
        request.issued = known
        state.changes += 1
        request.early.clear()  # they continue a text that nobody knows
        state.ledger.truncate(request_id, known - 1)
        out.append(Truncate(request_id, known - 1))
        useless = recount(state, request)
        if useless:
            out.append(Free(request_id, useless))
    return out


def recount(state: CoreState, request: RequestState) -> tuple[int, ...]:
    """Set `holes` after KV went. Where the first of them cannot be computed again, for want of what was dropped before
    it, all other KV is freed too: returns the instances it was on."""
    table, end = state.ledger.table, request.issued - 1
    request.holes = tuple(table.missing(request.id, end, request.dropped))
    if request.dropped <= request.read_from(state.cluster.kv_window):
        return ()
    held = tuple(sorted(state.ledger.tokens(request.id)))
    state.ledger.free(request.id, held)
    request.dropped = 0
    request.holes = tuple(table.missing(request.id, end))
    return held
