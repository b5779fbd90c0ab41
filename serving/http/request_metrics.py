"""What requests took, counted while they run: latencies and lengths in histograms with vLLM's bounds, ends, refusals.

It belongs to the asyncio thread and takes a fraction of a microsecond a token. What it is not: the account of the
engine (`serving/state.py`) or the text of /metrics (`serving/http/metrics.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from loong_jax.types import FinishReason
from serving.errors import Refusal
from serving.http import errors
from serving.proto.loong.v1 import loong_pb2 as pb

# fmt: off
_FIRST_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
_GAP_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on
_CHOICES = (1, 2, 5, 10, 20, 50)


class Histogram:
    """Counts by upper bounds. The library's own locks and looks for the bucket from the first one on."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above), as the text format has it."""
        buckets, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    bounds = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= most)


class RequestMetrics:
    """Observer of a Generator: makes one of every stream."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: the most that a request may have."""
        tokens = token_bounds(max_tokens)
        self.histograms = {
            "vllm:time_to_first_token_seconds": Histogram(_FIRST_S),
            "vllm:inter_token_latency_seconds": Histogram(_GAP_S),
            "vllm:request_time_per_output_token_seconds": Histogram(_GAP_S),
            "vllm:e2e_request_latency_seconds": Histogram(_REQUEST_S),
            "vllm:request_queue_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_prefill_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_decode_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_inference_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_prompt_tokens": Histogram(tokens),
            "vllm:request_generation_tokens": Histogram(tokens),
            "vllm:request_params_n": Histogram(_CHOICES),
            "vllm:request_params_max_tokens": Histogram(tokens),
        }
        self.ended: Counter[FinishReason] = Counter()
        self.refusals: Counter[str] = Counter()
        """By the code of HTTP's error object, from gRPC, too."""

    def stream(self, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int) -> StreamMetrics:
        return StreamMetrics(self, request, arrived_us, num_prompt_tokens)

    def refused(self, refusal: Refusal) -> None:
        self.refusals[errors.body(refusal)["error"]["code"]] += 1


class StreamMetrics:
    """One choice of a request, at times of the engine's clock."""

    def __init__(
        self, metrics: RequestMetrics, request: pb.GenerateRequest, arrived_us: int, num_prompt_tokens: int
    ) -> None:
        self._metrics = metrics
        self._gaps = metrics.histograms["vllm:inter_token_latency_seconds"]
        self._n = request.n or 1
        self._max_tokens = request.max_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived_us = arrived_us
        self._started_us = self._first_us = self._last_us = -1  # not yet

    def prefilled(self, now_us: int) -> None:
        if self._started_us < 0:
            self._started_us = now_us

    def emitted(self, num_tokens: int, now_us: int) -> None:
        """Tokens of one step have one gap."""
        if self._first_us < 0:
            self._first_us = now_us
            self._observe("vllm:time_to_first_token_seconds", self._arrived_us, now_us)
        else:
            self._gaps.observe((now_us - self._last_us) / 1e6)
        self._last_us = now_us

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        """Latencies are of those that ended by themselves."""
        self._metrics.ended[reason] += 1
        if reason not in (FinishReason.STOP, FinishReason.LENGTH) or self._first_us < 0:
            return
        histograms = self._metrics.histograms
        histograms["vllm:request_prompt_tokens"].observe(self._num_prompt_tokens)
        histograms["vllm:request_generation_tokens"].observe(num_tokens)
        histograms["vllm:request_params_n"].observe(self._n)
        if self._max_tokens:
            histograms["vllm:request_params_max_tokens"].observe(self._max_tokens)
        started_us = self._first_us if self._started_us < 0 else self._started_us  # a choice that shares its prefill
        self._observe("vllm:e2e_request_latency_seconds", self._arrived_us, self._last_us)
        self._observe("vllm:request_queue_time_seconds", self._arrived_us, started_us)
        self._observe("vllm:request_prefill_time_seconds", started_us, self._first_us)
        self._observe("vllm:request_decode_time_seconds", self._first_us, self._last_us)
        self._observe("vllm:request_inference_time_seconds", started_us, self._last_us)
        if num_tokens > 1:
            gap_us = (self._last_us - self._first_us) / (num_tokens - 1)
            histograms["vllm:request_time_per_output_token_seconds"].observe(gap_us / 1e6)

    def _observe(self, name: str, since_us: int, now_us: int) -> None:
        self._metrics.histograms[name].observe((now_us - since_us) / 1e6)
