"""Links as measured: seconds of one message or collective by its size, alpha + beta * bytes in each regime of sizes.

Libraries switch protocols and algorithms with the size, so one straight line is wrong by half at some sizes; a few
pieces follow the profiles of NVLink and InfiniBand to a few percent. What it is not: a roofline of links nobody
measured (that takes the published rates of `hardware.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from loong_jax.cost import fit
from loong_jax.types import Record

NUM_PIECES = 6
_ROUNDS = 30
_LEAST_ERROR = 1e-3  # below it a point weighs no more: it fits


class Piece(Record, frozen=True):
    """Messages of at most `up_to_bytes` take `latency_s + byte_s * bytes`."""

    up_to_bytes: float
    latency_s: float
    byte_s: float


class LinkModel(Record, frozen=True):
    """`pieces` in order of size; the last one also holds beyond its end."""

    pieces: tuple[Piece, ...]

    def seconds(self, num_bytes: float) -> float:
        place = bisect_left(self.pieces, num_bytes, key=lambda piece: piece.up_to_bytes)
        piece = self.pieces[min(place, len(self.pieces) - 1)]
        return piece.latency_s + piece.byte_s * num_bytes


def spread(num: int, total: int) -> list[int]:
    """`num` of the indices 0 .. total - 1, evenly, with both ends: which sizes of a list to measure."""
    if num >= total or num < 2:
        return list(range(total))
    return [round(i * (total - 1) / (num - 1)) for i in range(num)]


def fit_link(sizes: Sequence[float], seconds: Sequence[float], num_pieces: int = NUM_PIECES) -> LinkModel:
    """From measured messages, in any order. Raises ValueError when a piece would have fewer than three of them, or when
    a time is not positive."""
    points = sorted(zip(sizes, seconds, strict=True))
    if len(points) < 3 * num_pieces:
        raise ValueError(f"{len(points)} measurements are too few for {num_pieces} pieces")
    if any(s <= 0 for _, s in points):
        raise ValueError("a measured time is not positive")
    cuts = [i * len(points) // num_pieces for i in range(num_pieces + 1)]
    return LinkModel(tuple(_piece(points[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)))


def _piece(points: Sequence[tuple[float, float]]) -> Piece:
    """Least absolute relative error, as least squares in rounds: single slow messages are no rule."""
    rows = [[1.0 / s, size / s] for size, s in points]
    weights = [1.0] * len(rows)
    latency_s = byte_s = 0.0
    for _ in range(_ROUNDS):
        weighted = [[x * w for x in row] for row, w in zip(rows, weights, strict=True)]
        latency_s, byte_s = fit.nonnegative(weighted, weights)
        errors = [abs(a * latency_s + b * byte_s - 1) for a, b in rows]
        weights = [max(error, _LEAST_ERROR) ** -0.5 for error in errors]
    return Piece(points[-1][0], latency_s, byte_s)
