"""Mistakes made by hand in manager, ledger and policy, to see that simulation testing finds them.

A mutant names a function, a text in it and what stands there instead. The function is compiled again from its changed
source, and put back afterwards. A text that is not there exactly once is an error: mutants do not rot unseen.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import NamedTuple

from tests.support import dst


class Mutant(NamedTuple):
    name: str
    target: str  # module:function or module:Class.method
    old: str
    new: str


LAST_FOUND_BY = {
    "write behind a gap": 33, "drop a request on loss": 1, "ignore an abort": 1, "let any number wait": 1,
    "take answers in any order": 7, "keep early tokens of a lost text": 74, "do not roll back": 5, "lose nothing": 1,
    "reset under a running step": 1, "never reset": 5, "show a page more": 4, "promise what a loss took": 99,
    "evict, but think it is there": 17, "feed from the wrong device": 2, "evict the oldest": 163,
    "a page for two rows": 44, "keep more than fits": 43, "feed a master that has no token": 15,
    "free a page twice": -1, "count moved tokens at home too": -1, "overfill a page": -1, "end without freeing": -1,
    "read on past a stop": -1, "offer a lost instance": -1, "forget a step": -1, "skip ageing": -1,
    "starve the long": -1, "plan for full queues": -1,
}  # fmt: skip
"""A seed (0 for those not named), or -1 for the crowd. The suite looks there first, which saves time and no more; the
slow leg starts without it."""


class Found(NamedTuple):
    """`seed`: -1 for the crowd."""

    seed: int
    cpu_s: float
    error: Exception


def hunt(mutant: Mutant, budget_s: float, first: int = -1) -> Found | None:
    """What finds the mutant within so much CPU time: a crowd that starves somebody, or a seed. Policies are hunted in
    the one policy that they belong to. `first`: the seed to begin with, before all others; -1: the crowd."""
    start_s = time.process_time()
    policies = ("elastic",) if mutant.target.startswith("policy") else ()
    with mutated(mutant):
        for seed in chain((first,), count(-1)):
            if time.process_time() - start_s >= budget_s:
                break
            try:
                if seed < 0:
                    dst.check_crowd("elastic")
                else:
                    dst.simulate(seed, policies)
            except Exception as error:
                return Found(seed, time.process_time() - start_s, error)
    return None


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    owner, name = _find(mutant.target)
    original = inspect.getattr_static(owner, name)
    function = original.__func__ if isinstance(original, staticmethod) else original
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: {mutant.target} holds {mutant.old!r} {source.count(mutant.old)} times"
        )
    namespace: dict = {}
    changed = source.replace(mutant.old, mutant.new).removeprefix("@staticmethod\n")
    flags = __future__.annotations.compiler_flag
    exec(compile(changed, f"<mutant {mutant.name}>", "exec", flags), function.__globals__, namespace)
    made = namespace[function.__name__]
    setattr(owner, name, staticmethod(made) if isinstance(original, staticmethod) else made)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _find(target: str) -> tuple[object, str]:
    module, _, path = target.partition(":")
    owner: object = importlib.import_module(f"loong_jax.{module}")
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name


MUTANTS = (
    # the ledger
    Mutant("leak a page", "ledger:Ledger._release", "if left == 0:", "if left == 0 and page != 3:"),
    Mutant("free a page twice", "ledger:Ledger._release", "free.append(page)", "free += [page, page]"),
    Mutant("count moved tokens at home too", "ledger:Ledger.move", "self._count(request, src, -num_tokens)", "pass"),
    Mutant("write behind a gap", "ledger:Ledger.extend", "last.end == position\n", "True\n"),
    Mutant("overfill a page", "ledger:Ledger.extend", "count < self.page_tokens", "count <= self.page_tokens"),
    Mutant("keep KV of what is freed", "ledger:Ledger.free", "self._tokens.pop(request, None)", "pass"),
    Mutant(
        "put new pages before old ones", "runs:RunTable.add", "extents.insert(at, Extent", "extents.insert(0, Extent"
    ),
    # requests
    Mutant(
        "drop a request on loss",
        "manager:Manager._lose_kv",
        "self._out +=",
        "[self.state.remove(r) for r in [*self.state.requests.values()] if set(self.state.ledger.tokens(r.id)) &"
        " set(instances)][:0]\n    self._out +=",
    ),
    Mutant("end without freeing", "manager:Manager._finish", "state.ledger.free(request.id, held)", "pass"),
    Mutant("free without telling", "manager:Manager._finish", "self._out.append(Free(request.id, held))", "pass"),
    Mutant(
        "one token too many",
        "manager:Manager._append",
        "generated + 1 == request.max_tokens",
        "generated == request.max_tokens",
    ),
    Mutant("read on past a stop", "manager:Manager._append", "if token in request.stop_ids:", "if token < 0:"),
    Mutant("ignore an abort", "manager:Manager._on_aborted", "if request is not None:", "if request is None:"),
    Mutant("let any number wait", "manager:Manager._admit", "len(state.waiting) >=", "len(state.waiting) > 9 +"),
    Mutant("use a slot twice", "core_state:CoreState.start", "self.free_slots.pop()", "self.free_slots[-1]"),
    # steps and answers
    Mutant(
        "take answers in any order",
        "manager:Manager._on_step_done",
        "if index == len(request.tokens):",
        "if index >= len(request.tokens):",
    ),
    Mutant("keep early tokens of a lost text", "kv_upkeep:settle", "request.early.clear()", "pass  #"),
    Mutant("do not roll back", "kv_upkeep:settle", "request.issued = known", "pass"),
    Mutant("lose nothing", "kv_upkeep:lose", "if lost:", "if lost and len(gone) > 1:"),
    Mutant("reset under a running step", "manager:Manager._unblock", "state.queued[i] == 0 and ", ""),
    Mutant(
        "never reset", "manager:Manager._unblock", "if drained:", "if drained and not state.steps and not state.now_us:"
    ),
    Mutant(
        "offer a lost instance",
        "core_state:CoreState.instance_views",
        "if i in blocked else queued",
        "if not i else queued",
    ),
    Mutant(
        "show a page more", "core_state:CoreState.instance_views", "ledger.free_pages(i),", "ledger.free_pages(i) + 1,"
    ),
    Mutant(
        "forget a step",
        "core_state:CoreState.close_step",
        "self.queued[instance] -= 1",
        "self.queued[instance] -= instance == 0",
    ),
    Mutant(
        "promise what a loss took",
        "manager:Manager._on_instance_lost",
        "if not state.fits(request.end - 1):",
        "if False:",
    ),
    Mutant("evict, but think it is there", "issue:evict", "request.holes = whole(request.issued - 1)", "pass"),
    Mutant(
        "feed from the wrong device",
        "issue:decode",
        "request.sampled_on = instances",
        "request.sampled_on = tuple(range(state.cluster.num_instances))",
    ),
    Mutant("skip part of a hole", "issue:_subtract", "position = run.end", "position = run.end + 1"),
    Mutant(
        "pages in another order",
        "issue:_prefill_row",
        "pages += own",
        "pages += own[::-1]",
    ),
    # the policy
    Mutant("skip ageing", "policy.dispatch:Line.top", "while self._alarms and", "while self._alarms and not count and"),
    Mutant("starve the long", "policy.dispatch:target_us", "return ", "return 1e18 if request.known > 100 else "),
    Mutant("evict the oldest", "policy.draft:Draft.victim", "holders[-1]", "holders[0]"),
    Mutant("start more than may", "policy.dispatch:admitted", "(places <= 0 and not candidate.begun)", "False"),
    Mutant("decode past the end", "policy.elastic:_split", "if request.issued <", "if request.issued <="),
    Mutant("plan for full queues", "policy.draft:Draft.__init__", "instance.queued < MAX", "instance.queued <= MAX"),
    Mutant("a page for two rows", "policy.scale:DecodePlanner._masters", "if free[i] > used[i]", "if free[i] > 0"),
    Mutant("keep more than fits", "policy.placement:even", "min(free[i], max(0, low - pages))", "max(0, low - pages)"),
    Mutant(
        "feed a master that has no token", "policy.scale:DecodePlanner._masters", "(not device or i in device)", "True"
    ),
)
"""Every one is found by `tests/loong_jax/sim/test_mutants.py`."""
