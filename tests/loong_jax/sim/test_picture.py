import sys
from pathlib import Path

import pytest

from loong_jax.config import ConfigError
from loong_jax.sim import run
from loong_jax.sim.picture import Bar, bars, draw_sweep, draw_timeline
from loong_jax.sim.trace import Span
from loong_jax.types import Phase
from tests.support.simulated import small_config


def test_alike_steps_in_a_row_are_one_bar() -> None:
    row = lambda n: tuple((r, 1) for r in range(n))
    spans = [
        Span(0, 900, (0, 1), Phase.PREFILL, ((7, 64), (8, 2))),
        Span(900, 1000, (0,), Phase.DECODE, row(1)),
        Span(1000, 1100, (0,), Phase.DECODE, row(1)),
        Span(1100, 1200, (0,), Phase.DECODE, row(4)),
        Span(1900, 2000, (0,), Phase.DECODE, row(4)),  # after a pause
        Span(900, 2000, (1,), Phase.MIGRATE, ((7, 16),)),
    ]
    assert bars(spans) == [
        Bar(0, 900, (0, 1), Phase.PREFILL, 7),
        Bar(900, 1100, (0,), Phase.DECODE, 0),
        Bar(1100, 1200, (0,), Phase.DECODE, 3),
        Bar(1900, 2000, (0,), Phase.DECODE, 3),
        Bar(900, 2000, (1,), Phase.MIGRATE, -1),
    ]


def test_pictures_are_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(small_config([(1000 * i, 300, 5) for i in range(4)], record=True))
    draw_timeline(result.spans, 2, tmp_path / "t.png")
    draw_sweep(
        [
            {
                "workload": "w", "policy": "p", "offered_rate": rate, "slo_attainment": 1 / rate,
                "attainment_by_decile": [1.0] * 10,
            }
            for rate in (1.0, 2.0)
        ],
        tmp_path / "s.png",
    )  # fmt: skip
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("t.png", "s.png"))


def test_without_steps_or_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="timeline"):
        draw_timeline([], 2, tmp_path / "t.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"loong-jax\[plots\]"):
        draw_sweep([], tmp_path / "t.png")
