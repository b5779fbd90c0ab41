"""One unfinished request, as the manager keeps it. Mutable; only `manager.py` and `issue.py` change it.

Lengths (see `types.py`): `known` tokens are on the host, `issued` counts one more for each token being sampled by a
step in flight. KV lies in `[dropped, issued - 1)` except `holes`; position `issued - 1` is the next step's input. What
lies before `dropped` was computed, and no layer's window reaches back to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from loong_jax.ledger import Ledger
from loong_jax.types import (
    Adjust,
    Adjustment,
    EmitScores,
    RequestView,
    Resident,
    Run,
    Sampling,
    Scores,
    TokenBytes,
    Top,
)

NO_SLOT = -1


class RequestState:
    __slots__ = (
        "id", "arrived_us", "slot", "tokens", "prompt_len", "max_tokens", "sampling", "stop_ids", "issued", "holes",
        "steps", "early", "device_group", "last_master", "num_evictions", "rope_len", "adjustment", "needs_history",
        "num_prompt_top", "num_scored", "dropped", "_view",
    )  # fmt: skip

    def __init__(
        self,
        request: int,
        arrived_us: int,
        prompt: TokenBytes | array[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Iterable[int],
        adjustment: Adjustment | None = None,
        num_prompt_top: int | None = None,
        rope_len: int | None = None,
    ) -> None:
        """`rope_len`: that of the request whose KV it shares; None: from its own prompt and `max_tokens`."""
        self.id = request
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
        self.device_group: tuple[int, ...] = ()
        self.last_master = -1
        self.num_evictions = 0
        # Fixed here for life: cached keys must depend neither on chunks nor on how far decoding has come.
        self.rope_len = self.end if rope_len is None else rope_len
        self.adjustment = adjustment
        self.needs_history = adjustment is not None and adjustment.needs_history
        self.num_prompt_top = num_prompt_top
        self.num_scored = 1  # prompt tokens whose log-probabilities are out; the first one has none
        self.dropped = 0
        self._view: RequestView | None = None

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def end(self) -> int:
        """Tokens it has when it reaches `max_tokens`."""
        return self.prompt_len + self.max_tokens

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
        self.changed()
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

    def changed(self) -> None:
        self._view = None

    def view(self, ledger: Ledger) -> RequestView:
        """What the policy sees; built again only after a change."""
        view = self._view
        if view is None:
            view = self._view = self._build_view(ledger)
        return view

    def _build_view(self, ledger: Ledger) -> RequestView:
        known, issued, request = len(self.tokens), self.issued, self.id
        held = ledger.tokens(request)
        pages = ledger.table.pages
        if len(held) == 1:
            ((instance, tokens),) = held.items()
            resident = (Resident(instance, tokens, len(pages(request, instance))),)
        else:
            resident = tuple(Resident(i, held[i], len(pages(request, i))) for i in sorted(held))
        tail = ledger.open_page(request, issued - 1, self.last_master)
        # Where every device that has the newest token lost its pool, only the host can feed it, once it knows it; nor
        # can the devices where penalties depend on it. And no token is sampled before the prompt's scores are out.
        fed = issued == known or (bool(self.device_group) and not self.needs_history)
        running = fed and not self.holes and not self.score
        return RequestView(
            request,
            self.arrived_us,
            self.prompt_len,
            known,
            issued,
            self.max_tokens,
            known - self.prompt_len,
            running,
            self.missing,
            resident,
            None if tail is None else (tail[0], ledger.page_tokens - tail[1].count),
            self.device_group if issued > known else (),
            len(self.steps),
            self.num_evictions,
            self.score,
        )


def whole(kv_len: int) -> tuple[Run, ...]:
    return (Run(0, kv_len),) if kv_len > 0 else ()
