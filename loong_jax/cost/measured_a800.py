"""Step times of the published LoongServe on a node of eight A800, LWM-Text-1M (Llama-2-7B), identical requests.

Read from the executed notebooks of the artifact (LoongServe, SOSP'24; test/longserve/3-*.ipynb, figure 3; 6-*.ipynb,
figure 14b of the paper) and from its raw measurements of small batches. Milliseconds. `sp` instances of `tp` GPUs, KV
spread evenly over them; `masters` of them computed the decode rows.
"""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    sp: int
    tp: int
    batch: int
    length: int
    masters: int
    prefill_ms: float
    decode_ms: float


FIGURE_3 = (
    Measured(1, 8, 512, 1_000, 1, 7757, 38.9),
    Measured(1, 8, 128, 5_000, 1, 10157, 37.8),
    Measured(1, 8, 64, 10_000, 1, 10792, 36.4),
    Measured(1, 8, 16, 50_000, 1, 19506, 42.9),
    Measured(1, 8, 4, 100_000, 1, 13546, 26.4),
    Measured(1, 8, 1, 500_000, 1, 51135, 37.6),
    Measured(2, 4, 512, 1_000, 2, 5776, 42.5),
    Measured(2, 4, 128, 5_000, 1, 7694, 40.3),
    Measured(2, 4, 64, 10_000, 1, 8306, 38.1),
    Measured(2, 4, 16, 50_000, 1, 16595, 44.9),
    Measured(2, 4, 4, 100_000, 1, 12147, 28.0),
    Measured(2, 4, 1, 500_000, 1, 51700, 41.6),
    Measured(4, 2, 512, 1_000, 4, 5267, 42.3),
    Measured(4, 2, 128, 5_000, 2, 7072, 41.4),
    Measured(4, 2, 64, 10_000, 2, 7701, 40.1),
    Measured(4, 2, 16, 50_000, 1, 15744, 45.9),
    Measured(4, 2, 4, 100_000, 1, 11798, 28.9),
    Measured(4, 2, 1, 500_000, 1, 53606, 37.8),
)

SMALL = (
    Measured(1, 1, 1, 10, 1, 18.6, 11.4),
    Measured(1, 1, 1, 1_000, 1, 68.9, 13.0),
    Measured(4, 2, 1, 100, 1, 38.5, 9.76),
)


class Masters(NamedTuple):
    """Decode time with `masters` masters over that with one; sp 4, tp 2; read off the figure, +-0.03."""

    batch: int
    length: int
    masters: int
    ratio: float


FIGURE_14B = (
    # The shapes with rows enough to share; at 16 rows and fewer the figure shows noise around 1.0 to 1.12.
    Masters(1024, 10, 2, 0.63),
    Masters(1024, 10, 4, 0.46),
    Masters(256, 100, 2, 0.84),
    Masters(256, 100, 4, 0.68),
    Masters(64, 1_000, 2, 1.10),
    Masters(64, 1_000, 4, 1.12),
)

NUM_BATCHES = len(FIGURE_3) + len(SMALL) + len({(m.batch, m.length) for m in FIGURE_14B}) + len(FIGURE_14B)
"""Batches behind the calibration: a ratio takes one more, with one master."""
