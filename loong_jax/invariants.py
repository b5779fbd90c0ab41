"""The named invariants of DESIGN 8, as checks over the manager's state, and the state as text.

What it is: everything that can be checked between two events (INV-1, 2, 4, 5, 6, 8). INV-3 and INV-10 are checked on
every event by `manager.py` and `issue.py`; INV-7, 9 and 11 are properties of runs, checked by tests.
"""

from __future__ import annotations

from loong_jax.core_state import MAX_QUEUED_STEPS, CoreState
from loong_jax.ledger import InvariantError
from loong_jax.request_state import NO_SLOT


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantError(message)


def check(state: CoreState) -> None:
    """Raises `InvariantError` naming the first invariant that does not hold."""
    check_state(state)
    check_progress(state)


def check_state(state: CoreState) -> None:
    """All that hold whatever the policy does: INV-1, 2, 4, 5, 6."""
    _check_requests(state)
    _check_steps(state)
    state.ledger.check()
    _check_kv(state)


def _check_requests(state: CoreState) -> None:
    live = len(state.requests)
    _require(state.num_admitted == live + state.num_finished, "INV-1: a request was lost or ended twice")
    _require(set(state.active) | set(state.waiting) == set(state.requests), "INV-2: a request is nowhere")
    _require(len(state.active) + len(state.waiting) == live, "INV-2: a request is both active and waiting")
    _require(state.active == sorted(state.active), "INV-2: active requests are out of order")
    _require(len(state.active) <= state.limits.max_running, "INV-2: more than max_running requests")
    slots = [state.requests[r].slot for r in state.active]
    _require(sorted(slots + state.free_slots) == list(range(state.cluster.slots)), "INV-2: slots")
    for request_id in state.waiting:
        request = state.requests[request_id]
        idle = request.slot == NO_SLOT and not request.steps and not state.ledger.tokens(request_id)
        _require(idle, f"INV-2: waiting request {request_id} holds something")


def _check_steps(state: CoreState) -> None:
    for instance, queued in enumerate(state.queued):
        steps = [s for s in state.steps.values() if instance in s.instances]
        _require(queued == len(steps) <= MAX_QUEUED_STEPS, f"INV-6: instance {instance} has {len(steps)} steps")
        _require(state.prefilling[instance] == sum(s.is_prefill for s in steps), f"INV-6: prefills of {instance}")
    for request in state.requests.values():
        steps = sorted(s.step for s in state.steps.values() if request.id in s.requests)
        _require(sorted(request.steps) == steps, f"INV-6: request {request.id}: {request.steps} in flight, not {steps}")


def _check_kv(state: CoreState) -> None:
    for request in state.requests.values():
        known = request.known
        _require(known <= request.issued <= request.end, f"INV-2: request {request.id}: lengths")
        _require(bool(request.steps) or request.issued == known, f"INV-2: request {request.id}: issued, not in flight")
        first = request.dropped
        gaps = tuple(state.ledger.table.missing(request.id, request.issued - 1, first))
        _require(gaps == request.holes, f"INV-5: request {request.id}: {gaps} lack KV, not {request.holes}")
        tokens = sum(state.ledger.tokens(request.id).values())
        wanted = request.issued - 1 - first - sum(run.count for run in gaps)
        _require(tokens == wanted, f"INV-5: request {request.id} has {tokens} tokens of KV, not {wanted}")
        needed = request.read_from(state.cluster.kv_window)
        _require(first <= needed, f"INV-5: request {request.id} lacks KV before {first}, and {needed} on is read")


def check_progress(state: CoreState) -> None:
    """INV-8, in the form that needs no knowledge of the policy: nothing runs, although something could."""
    idle = state.requests and not state.steps and not state.blocked and not state.preparing and state.ready
    held = any(reservation.until_us > state.now_us for reservation in state.reservations.values())
    _require(not idle or held, "INV-8: requests are live, every instance is idle, and nothing was issued")


def describe(state: CoreState) -> str:
    """A line per instance and per request."""
    ledger = state.ledger
    lines = [f"t={state.now_us} us, {len(state.steps)} steps in flight, {len(state.ready)} programs ready"]
    for i, queued in enumerate(state.queued):
        used = ledger.num_pages - ledger.free_pages(i)
        bar = "#" * (20 * used // ledger.num_pages)
        flags = ("" if state.alive[i] else " lost") + (" blocked" if i in state.blocked else "")
        steps = [s.step for s in state.steps.values() if i in s.instances]
        lines.append(f"instance {i} [{bar:20}] {used}/{ledger.num_pages} pages, steps {steps}{flags}, queued {queued}")
    for request in state.requests.values():
        held = {i: ledger.tokens(request.id)[i] for i in sorted(ledger.tokens(request.id))}
        status = "waiting" if request.slot == NO_SLOT else "prefill" if request.holes else "decode"
        holes = [(run.first, run.end) for run in request.holes[:4]]
        lengths = f"prompt {request.prompt_len}, known {request.known}, issued {request.issued}, end {request.end}"
        lines.append(
            f"request {request.id} {status}: {lengths}, kv {held}, holes {holes}, steps {request.steps}, "
            f"evicted {request.num_evictions}"
        )
    return "\n".join(lines)
