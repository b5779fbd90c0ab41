"""One unfinished request, as the manager keeps it. Mutable; only `manager.py` and `issue.py` change it.

Lengths (see `types.py`): `known` tokens are on the host, `issued` counts one more for each token being sampled by a
step in flight. KV lies in `[dropped, issued - 1)` except `holes`; position `issued - 1` is the next step's input. What
lies before `dropped` was computed, and no layer's window reaches back to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from loong_jax.ledger import Ledger
from loong_jax.types import (
    NEVER,
    NO_TARGET,
    Adjust,
    Adjustment,
    EmitScores,
    Phase,
    Resident,
    Run,
    Sampling,
    Scores,
    Target,
    TokenBytes,
    Top,
)

NO_SLOT = -1


class RequestState:
    __slots__ = (
        "id", "arrived_us", "slot", "tokens", "prompt_len", "max_tokens", "sampling", "stop_ids", "issued", "holes",
        "steps", "early", "sampled_on", "last_master", "num_evictions", "rope_len", "adjustment", "needs_history",
        "num_prompt_top", "num_scored", "dropped", "target", "first_token_us", "request", "end", "_ledger",
    )  # fmt: skip

    def __init__(
        self,
        ledger: Ledger,
        request: int,
        arrived_us: int,
        prompt: TokenBytes | array[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Iterable[int],
        adjustment: Adjustment | None = None,
        num_prompt_top: int | None = None,
        rope_len: int | None = None,
        target: Target = NO_TARGET,
    ) -> None:
        """`rope_len`: that of the request whose KV it shares; None: from its own prompt and `max_tokens`."""
        self.id = self.request = request
        self.arrived_us = arrived_us
        self.slot = NO_SLOT
        self.tokens = array("i")
        self.tokens.frombytes(bytes(prompt))
        self.prompt_len = len(self.tokens)
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.issued = self.prompt_len
        self.holes: tuple[Run, ...] = whole(self.prompt_len - 1)
        self.steps: list[int] = []
        # Tokens whose step was reported before the step that samples the one before: index -> token, logprob, DoP, top.
        self.early: dict[int, tuple[int, float, int, Top | None]] = {}
        self.sampled_on: tuple[int, ...] = ()  # instances whose devices have the newest token
        self.last_master = -1
        self.num_evictions = 0
        self.end = self.prompt_len + max_tokens  # tokens it has when it reaches `max_tokens`
        # Fixed here for life: cached keys must depend neither on chunks nor on how far decoding has come.
        self.rope_len = self.end if rope_len is None else rope_len
        self.adjustment = adjustment
        self.needs_history = adjustment is not None and adjustment.needs_history
        self.num_prompt_top = num_prompt_top
        self.num_scored = 1  # prompt tokens whose log-probabilities are out; the first one has none
        self.dropped = 0
        self.target = target
        self.first_token_us = NEVER
        self._ledger = ledger

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def score(self) -> bool:
        """Whether its next prefill is a scoring one."""
        return self.num_prompt_top is not None and self.num_scored < self.prompt_len

    @property
    def missing(self) -> tuple[Run, ...]:
        """Positions of `[0, known)` without KV, ascending."""
        if self.issued > len(self.tokens):
            return self.holes
        last = self.issued - 1
        if self.holes and self.holes[-1].end == last:
            return (*self.holes[:-1], Run(self.holes[-1].first, self.holes[-1].count + 1))
        return (*self.holes, Run(last, 1))

    def take_scores(self, runs: tuple[Run, ...], scores: Scores) -> EmitScores | None:
        """What is new in the scores of the tokens after the positions of `runs`. Chunks come in order, and what is
        computed again, after an eviction or a loss, was scored before."""
        first, end = self.num_scored, min(runs[-1].end + 1, self.prompt_len)
        if first >= end:
            return None
        # Nothing behind the last scored token has been computed before, so that is the end of the runs, without a gap.
        num_new = runs[-1].end + 1 - first
        num_before = sum(run.count for run in runs) - num_new
        assert num_before == sum(max(0, min(run.end, first - 1) - run.first) for run in runs), (first, runs)
        self.num_scored = end
        return EmitScores(self.id, first, scores.part(num_before, end - first))

    def adjust(self) -> Adjust | None:
        """The command that tells the executor how its logits are adjusted; None for most requests."""
        if self.adjustment is None:
            return None
        prompt = self.tokens[: self.prompt_len].tobytes() if self.adjustment.repetition_penalty != 1 else b""
        return Adjust(self.id, self.adjustment, prompt, self.prompt_len, tuple(sorted(self.stop_ids)))

    def read_from(self, window: int) -> int:
        """The first position that any step to come reads, where each layer sees `window` positions, its own included:
        what is computed next, or would be if all steps in flight failed, looks back that far."""
        first = len(self.tokens) - 1
        if self.holes and self.holes[0].first < first:
            first = self.holes[0].first
        return max(0, first - window + 1) if window else 0

    # ---- what a policy sees of it (`types.RequestView`)

    @property
    def running(self) -> bool:
        if self.holes or (self.num_prompt_top is not None and self.score):
            return False  # no token is sampled before the prompt's scores are out
        # Where every device that has the newest token lost its pool, only the host can feed it, once it knows it; nor
        # can the devices where penalties depend on it.
        return self.issued == len(self.tokens) or (bool(self.sampled_on) and not self.needs_history)

    @property
    def kv(self) -> Mapping[int, int]:
        return self._ledger.tokens(self.id)

    @property
    def resident(self) -> tuple[Resident, ...]:
        held, pages = self._ledger.tokens(self.id), self._ledger.table.num_pages
        if len(held) == 1:
            ((instance, tokens),) = held.items()
            return (Resident(instance, tokens, pages(self.id, instance)),)
        return tuple([Resident(i, held[i], pages(self.id, i)) for i in sorted(held)])

    @property
    def open_page(self) -> tuple[int, int] | None:
        tail = self._ledger.open_page(self.id, self.issued - 1, self.last_master)
        return None if tail is None else (tail[0], self._ledger.page_tokens - tail[1])

    @property
    def device_group(self) -> tuple[int, ...]:
        return self.sampled_on if self.issued > len(self.tokens) else ()

    @property
    def in_flight(self) -> int:
        return len(self.steps)

    @property
    def prefill_phase(self) -> Phase:
        return Phase.SCORE if self.score else Phase.PREFILL


def whole(kv_len: int) -> tuple[Run, ...]:
    return (Run(0, kv_len),) if kv_len > 0 else ()
