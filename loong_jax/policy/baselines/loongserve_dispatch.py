"""Which waiting requests LoongServe starts (LoongServe section 4.2), with the constants of its published runs.

What it is: the scan of its request queue, on what the released code computes it from.
What it is not: where they run (`loongserve.py`), or Loong's own dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loong_jax.policy.baselines.board import Board, future_pages
from loong_jax.types import ContextForm, RequestView

_MAX_SCAN = 256
"""Waiting requests looked at in one round. The released code looks at all of them."""


class Constants(NamedTuple):
    """Flags of the released code, as its experiments set them. `decode_s`: of an iteration of decoding (0: by the cost
    model, as in the paper's text); `max_prefill_s`: no request more beyond it; `max_out_of_order`: rounds in a row that
    may pass a request (64: the runs with Zipf lengths; the others had 1 to 8); `wait_iterations`: of decoding between
    two rounds; `master_rows`: fewer rows than that have one master; `batch_tokens`: of one round; `output_tokens`:
    expected of a request before any has ended; `one_batch`: its batching finds one batch, whatever the requests;
    `forgets`: from the first undecided request on, its test of future memory leaves out what runs."""

    decode_s: float = 0.022
    max_prefill_s: float = 5.0
    max_out_of_order: int = 64
    wait_iterations: int = 10
    master_rows: int = 128
    batch_tokens: int = 500_000
    output_tokens: int = 512
    one_batch: bool = True
    forgets: bool = True


PAPER = Constants(decode_s=0.0, max_out_of_order=0, one_batch=False, forgets=False)
"""What the paper's text says, where the released code does otherwise (LoongServe section 8)."""


class Chosen(NamedTuple):
    requests: list[RequestView]
    out_of_order: bool  # a request was passed by one that is among them


def prefill_s(board: Board, dop: int, tokens: int, squares: float) -> float:
    """Of a batch with `tokens` in all and `squares` of its lengths in all."""
    if dop < 1:
        return float("inf")
    dop = min(dop, board.cluster.ladder.dops[-1])
    return board.cost.prefill_s(dop, tokens, squares / 2, 0, ContextForm.RING)


class Dispatch:
    """One scan. `running`: decoding; `mean_output`: tokens of requests that ended."""

    def __init__(
        self, board: Board, constants: Constants, running: Sequence[RequestView], mean_output: float, may_pass: bool
    ) -> None:
        self.board, self.constants, self.running = board, constants, running
        self._may_pass = may_pass
        pages = board.cluster.pages_per_instance
        self._num_instances = board.living.bit_count()
        self._pool = self._num_instances * pages
        used = sum(pages - free for i, free in enumerate(board.free) if board.living >> i & 1)
        self._most = self._pool - used
        # Instances that perfect packing of what is used would leave empty.
        self._empty = self._num_instances - -(-used // pages)
        self._isolated = self._empty * pages
        decode_s = constants.decode_s or self._decode_s()
        iterations = [max(10.0, mean_output - r.num_generated, 0.1 * r.num_generated) for r in running]
        self._wait_s = min(iterations, default=0.0) * decode_s
        self._slowed = sum(1 / max(1, r.num_generated) for r in running)
        self._forgot = False
        self._refused = self._pool + 1  # pages of the smallest request that memory to come did not allow

    def _decode_s(self) -> float:
        dop = max(1, self._num_instances - self._empty)
        kv_tokens = sum(r.known for r in self.running) // dop
        rows = len(self.running)
        return self.board.cost.decode_s(min(dop, self.board.cluster.ladder.dops[-1]), rows, -(-rows // dop), kv_tokens)

    def choose(self, waiting: Sequence[RequestView]) -> Chosen:
        """In order of arrival: those that idle instances take at no loss, then those worth stopping decodes for."""
        taken: list[RequestView] = []
        undecided: list[RequestView] = []
        worth = tokens = pages = 0
        squares = 0.0
        closed = passed = out_of_order = False
        may_pass, c = self._may_pass, self.constants
        for request in waiting[:_MAX_SCAN]:
            length, need = request.known, self.board.pages_needed(request)
            if (not taken or tokens + length <= c.batch_tokens) and self._fits(need, pages, taken, request):
                if (not undecided or may_pass) and pages + need <= self._isolated:
                    alone_s = prefill_s(self.board, self._empty, tokens + length, squares + length * length)
                    best_s = prefill_s(self.board, self._num_instances, tokens + length, squares + length * length)
                    if alone_s - best_s <= self._wait_s and (not taken or alone_s <= c.max_prefill_s):
                        taken.append(request)
                        tokens, pages, squares = tokens + length, pages + need, squares + length * length
                        may_pass = may_pass and alone_s <= c.max_prefill_s
                        out_of_order |= passed
                        continue
                others = sum(map(self.board.pages_needed, undecided))
                if not closed and self._fits(need, pages + others, [*taken, *undecided], request):
                    undecided.append(request)
                    if self._is_worth(taken, undecided):
                        worth = len(undecided)
                    self._forgot |= c.forgets
                    continue
                closed = True
            if not may_pass:
                break
            passed = True
        return Chosen(taken + undecided[:worth], out_of_order)

    def _fits(self, need: int, pages: int, others: list[RequestView], request: RequestView) -> bool:
        """Now, and when all run to their bounds."""
        if pages + need > self._most or need >= self._refused:
            return False
        running = () if self._forgot else self.running
        if future_pages(self.board, (*running, *others, request)) <= self._pool:
            return True
        self._refused = need
        return False

    def _is_worth(self, taken: list[RequestView], undecided: list[RequestView]) -> bool:
        """Equations 1 and 2, all decode batches in one: what their rows lose against what these would wait."""
        lengths = [r.known for r in (*taken, *undecided)]
        seconds = prefill_s(self.board, self._num_instances, sum(lengths), float(sum(n * n for n in lengths)))
        gain = self._wait_s * sum(1 / r.known for r in undecided)
        return seconds * self._slowed <= gain and (len(lengths) == 1 or seconds <= self.constants.max_prefill_s)
