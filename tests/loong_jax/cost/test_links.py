"""Links: what was put in comes out, outliers are no rule, and measured profiles are predicted from few sizes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loong_jax.cost.links import LinkModel, Piece, fit_link, spread

PROFILES = json.loads((Path(__file__).parents[2] / "fixtures" / "recorded" / "links.json").read_text())["profiles"]


def test_a_straight_link_comes_out() -> None:
    sizes = [2.0**k for k in range(10, 30)]
    model = fit_link(sizes, [5e-6 + size / 200e9 for size in sizes], num_pieces=4)
    for size in (3e3, 3e6, 3e9):  # inside, and far beyond the last
        assert model.seconds(size) == pytest.approx(5e-6 + size / 200e9, rel=1e-3)


def test_a_switch_of_protocols_is_followed() -> None:
    sizes = [1e5 * k for k in range(1, 41)]
    truth = [10e-6 + size / 50e9 if size <= 2e6 else 60e-6 + size / 300e9 for size in sizes]
    one, four = fit_link(sizes, truth, 1), fit_link(sizes, truth, 4)

    def worst(model: LinkModel) -> float:
        return max(abs(model.seconds(size) / s - 1) for size, s in zip(sizes, truth, strict=True))

    assert worst(four) < 0.01 < worst(one)


@pytest.mark.parametrize("factor", [4, 0.2])
def test_odd_messages_are_no_rule(factor: float) -> None:
    sizes = [1e4 * k for k in range(1, 31)]
    rng = random.Random(0)
    measured = [(10e-6 + size / 100e9) * (factor if rng.random() < 0.2 else 1) for size in sizes]
    model = fit_link(sizes, measured, 1)
    assert model.seconds(1.5e5) == pytest.approx(10e-6 + 1.5e5 / 100e9, rel=0.02)


def test_pieces_hold_up_to_their_end() -> None:
    model = LinkModel((Piece(10, 1.0, 0.0), Piece(20, 2.0, 0.0)))
    assert [model.seconds(size) for size in (1, 10, 11, 20, 99)] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", PROFILES)
def test_measured_links_from_32_sizes(name: str) -> None:
    """The fixture holds every 11th size of vidur's profiles; docs/cost_model.md has the figures for all of them."""
    points = PROFILES[name]
    measured = set(spread(32, len(points)))
    model = fit_link([points[i][0] for i in measured], [points[i][1] for i in measured])
    errors = sorted(abs(model.seconds(size) / ms - 1) for i, (size, ms) in enumerate(points) if i not in measured)
    assert len(errors) >= 50
    assert errors[len(errors) // 2] <= 0.05


def test_spread_takes_both_ends() -> None:
    assert spread(3, 5) == [0, 2, 4]
    assert spread(9, 3) == [0, 1, 2]
    assert len(set(spread(32, 994))) == 32


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_link([1.0] * 11, [1.0] * 11, 4)
    with pytest.raises(ValueError, match="positive"):
        fit_link([1.0] * 12, [0.0] * 12, 4)
