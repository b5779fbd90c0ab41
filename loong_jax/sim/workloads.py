"""Workloads: which requests come, and when. A function of a name, a rate, a number and a seed.

Names: sharegpt, leval, lveval, mixed, zipf-A; with a folder of traces: azure, mooncake, arxiv, leval-trace. With "+1m"
behind it, one prompt of a hundred is a million tokens long.
Arrivals: "poisson"; "bursts": gamma distributed gaps with a coefficient of variation of 3; "trace": the file's own,
scaled to the rate. As in the paper, a stream of unit rate is scaled so that its last request comes at number / rate.
What it is not: the lengths of a data set (`lengths.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec

from loong_jax.config import ConfigError
from loong_jax.sim import lengths
from loong_jax.sim.lengths import Draw, Lengths

ARRIVALS = ("poisson", "bursts", "trace")
BURST_CV = 3.0
NAMES = ("sharegpt", "leval", "lveval", "mixed", "zipf-1.0", "zipf-1.2", "zipf-1.4")
TRACES = ("azure", "mooncake", "arxiv", "leval-trace")
MAX_REQUESTS = 10_000_000

_SETS: dict[str, Draw] = {
    "sharegpt": lengths.sharegpt,
    "leval": lengths.leval,
    "lveval": lengths.lveval,
    "mixed": lengths.mixed,
}


class Request(msgspec.Struct, frozen=True, gc=False):
    """`output_len` is the truth, which nobody but the simulated sampler knows."""

    arrived_us: int
    prompt_len: int
    output_len: int
    max_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """Requests in order of arrival."""

    name: str
    rate: float
    requests: tuple[Request, ...]

    @property
    def prompt_lens(self) -> list[int]:
        return [request.prompt_len for request in self.requests]


def make_workload(
    name: str,
    *,
    rate: float,
    num_requests: int,
    seed: int,
    arrivals: str = "poisson",
    traces: Path | None = None,
) -> Workload:
    """Raises ConfigError that names the field, and OSError when a trace's file is not there."""
    if not 0 < rate < float("inf"):
        raise ConfigError(f"rate: {rate} is not a positive number of requests per second")
    if not 1 <= num_requests <= MAX_REQUESTS:
        raise ConfigError(f"num_requests: {num_requests} is not between 1 and {MAX_REQUESTS}")
    if arrivals not in ARRIVALS:
        raise ConfigError(f"arrivals: {arrivals!r} is none of {', '.join(ARRIVALS)}")
    base, _, suffix = name.partition("+")
    if suffix not in ("", "1m"):
        raise ConfigError(f"workload: {name!r}: only '+1m' may follow the name")
    draw, gaps_s = _source(base, traces, arrivals)
    if suffix:
        draw = lengths.with_long(draw)
    rng = random.Random(f"{base} {seed}")
    drawn = draw(rng, num_requests)
    when_s = _arrivals(arrivals, gaps_s, num_requests, random.Random(f"arrivals {seed}"))
    scale_s = num_requests / rate / when_s[-1]
    return Workload(name, rate, tuple(_requests(drawn, [s * scale_s for s in when_s])))


def _source(base: str, traces: Path | None, arrivals: str) -> tuple[Draw, Sequence[float]]:
    """How its lengths are drawn, and the gaps between its arrivals where it has some."""
    if base in TRACES:
        if traces is None:
            raise ConfigError(f"traces: workload {base!r} needs the folder of its file")
        file = lengths.read_trace(base, traces)
        if arrivals == "trace" and not file.arrivals_s:
            raise ConfigError(f"arrivals: the file of {base!r} does not say when requests came")
        gaps_s = [max(0.0, b - a) for a, b in zip(file.arrivals_s, file.arrivals_s[1:], strict=False)]
        return (lambda rng, num: [file.lengths[i % len(file.lengths)] for i in range(num)]), gaps_s
    if arrivals == "trace":
        raise ConfigError(f"arrivals: workload {base!r} has none of its own")
    if base in _SETS:
        return _SETS[base], ()
    if base.startswith("zipf-"):
        try:
            return lengths.zipf(float(base.removeprefix("zipf-"))), ()
        except ValueError as error:
            raise ConfigError(f"workload: {base!r}: no exponent") from error
    raise ConfigError(f"workload: {base!r} is none of {', '.join((*NAMES, *TRACES))}")


def _arrivals(kind: str, gaps_s: Sequence[float], num: int, rng: random.Random) -> list[float]:
    """Times of a stream of about unit rate; the last is positive."""
    if kind == "trace":
        repeated = [gaps_s[i % len(gaps_s)] for i in range(num)]
        return list(accumulate(repeated)) if sum(repeated) > 0 else [1.0] * num
    shape = 1.0 if kind == "poisson" else BURST_CV**-2
    return list(accumulate(rng.gammavariate(shape, 1 / shape) for _ in range(num)))


def _requests(drawn: Sequence[Lengths], when_s: Sequence[float]) -> Iterator[Request]:
    """`max_tokens` is the same for all requests of a workload, as a server's default is: it tells nothing."""
    most = 1 << max(request.output for request in drawn).bit_length()
    for request, seconds in zip(drawn, when_s, strict=True):
        yield Request(round(seconds * 1e6), request.prompt, request.output, most)
