"""What users feel, from the outcomes of requests: latencies, SLO attainment overall and by length, goodput.

TTFT: arrival to first token. TPOT: mean time between the following ones (0 for a single token). Normalised latencies
are the paper's: whole latency per token of prompt and output, TTFT per token of prompt, TPOT (LoongServe 7.1).
What it is not: a judge of policies, or a measure of the simulator itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

NUM_DECILES = 10
P90 = 0.9


class Slo(msgspec.Struct, frozen=True):
    """A request meets it when TTFT <= max(`ttft_factor` * alone_s(prompt_len), `ttft_floor_s`) and TPOT <= `tpot_s`.
    The defaults are those of the paper's figure 12; `alone_s` is the prefill time of such a prompt by itself on the
    whole cluster, in the paper SP4TP2 whatever configuration is judged."""

    alone_s: Callable[[int], float]
    ttft_factor: float = 25.0
    ttft_floor_s: float = 15.0
    tpot_s: float = 0.05

    def ttft_s(self, prompt_len: int) -> float:
        return max(self.ttft_factor * self.alone_s(prompt_len), self.ttft_floor_s)


class NormalisedSlo(msgspec.Struct, frozen=True):
    """Bounds of the mean normalised latencies, in seconds a token (LoongServe 7.1)."""

    token_s: float
    input_s: float
    output_s: float


PAPER_NORMALISED = {
    "sharegpt": NormalisedSlo(0.092, 0.020, 0.320),
    "leval": NormalisedSlo(0.0035, 0.0018, 0.320),
    "lveval": NormalisedSlo(0.0025, 0.0025, 0.365),
    "mixed": NormalisedSlo(0.070, 0.090, 0.360),
}
"""By the name of the workload."""


class Judged(Protocol):
    """What is asked of an outcome (`config.Outcome`)."""

    prompt_len: int
    arrived_us: int
    first_us: int
    last_us: int
    emitted: int
    status: str


class Quantiles(msgspec.Struct, frozen=True):
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, of finished requests. `slo_attainment`: share of all requests; `attainment_by_decile`: the
    same by tenths of the prompt lengths, shortest first; `goodput`: requests that met it, per second of arrivals."""

    num_requests: int
    finished: int
    unfinished: int
    rejected: int
    failed: int
    rate: float
    makespan_s: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    latency_s: Quantiles
    normalised_token_s: float
    normalised_input_s: float
    normalised_output_s: float
    slo_attainment: float
    attainment_by_decile: tuple[float, ...]
    decile_prompt_len: tuple[int, ...]
    goodput: float


def ttft_s(outcome: Judged) -> float:
    return (outcome.first_us - outcome.arrived_us) * 1e-6


def tpot_s(outcome: Judged) -> float:
    if outcome.emitted <= 1:
        return 0.0
    return (outcome.last_us - outcome.first_us) * 1e-6 / (outcome.emitted - 1)


def latency_s(outcome: Judged) -> float:
    return (outcome.last_us - outcome.arrived_us) * 1e-6


def meets(outcome: Judged, slo: Slo) -> bool:
    return (
        outcome.status == "finished"
        and tpot_s(outcome) <= slo.tpot_s
        and ttft_s(outcome) <= slo.ttft_s(outcome.prompt_len)
    )


def quantiles(values: Sequence[float]) -> Quantiles:
    if not values:
        return Quantiles()
    ordered = sorted(values)
    p50, p90, p99 = (quantile(ordered, q) for q in (0.5, 0.9, 0.99))
    return Quantiles(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between the neighbours, as numpy does by default."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(outcomes: Sequence[Judged], slo: Slo | None) -> Summary:
    """Without an SLO nothing attains it."""
    done = [o for o in outcomes if o.status == "finished"]
    arrivals_s = max((o.arrived_us for o in outcomes), default=0) * 1e-6  # since the clock's zero
    met = [slo is not None and meets(o, slo) for o in outcomes]
    deciles = _deciles(outcomes)
    num = len(outcomes)
    rate = num / arrivals_s if arrivals_s > 0 else 0.0
    status = [o.status for o in outcomes]
    return Summary(
        num_requests=num,
        finished=len(done),
        unfinished=status.count("unfinished"),
        rejected=status.count("rejected"),
        failed=status.count("failed"),
        rate=rate,
        makespan_s=max((o.last_us for o in done), default=0) * 1e-6,
        ttft_s=quantiles([ttft_s(o) for o in done]),
        tpot_s=quantiles([tpot_s(o) for o in done]),
        latency_s=quantiles([latency_s(o) for o in done]),
        normalised_token_s=_mean([latency_s(o) / (o.prompt_len + o.emitted) for o in done]),
        normalised_input_s=_mean([ttft_s(o) / o.prompt_len for o in done]),
        normalised_output_s=_mean([tpot_s(o) for o in done]),
        slo_attainment=sum(met) / num if num else 0.0,
        attainment_by_decile=tuple(_mean([float(met[i]) for i in decile]) for decile in deciles),
        decile_prompt_len=tuple(max((outcomes[i].prompt_len for i in decile), default=0) for decile in deciles),
        goodput=sum(met) / arrivals_s if arrivals_s > 0 else 0.0,
    )


def _deciles(outcomes: Sequence[Judged]) -> list[list[int]]:
    """Indices by tenths of the prompt lengths. Equal lengths may fall on both sides of a border."""
    order = sorted(range(len(outcomes)), key=lambda i: outcomes[i].prompt_len)
    num = len(order)
    return [order[num * d // NUM_DECILES : num * (d + 1) // NUM_DECILES] for d in range(NUM_DECILES)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def p90_goodput(points: Sequence[tuple[float, float]]) -> float:
    """The largest rate at which nine tenths of the requests meet the SLO: `points` are (rate, attainment), and between
    two rates attainment is taken for linear. 0 when the lowest rate misses it; the highest when none does."""
    best = 0.0
    ordered = sorted(points)
    for (low, good), (high, bad) in zip(ordered, ordered[1:], strict=False):
        if good >= P90 > bad:
            return low + (high - low) * (good - P90) / (good - bad)
    if ordered and all(attained >= P90 for _, attained in ordered):
        best = ordered[-1][0]
    return best
