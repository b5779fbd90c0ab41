"""The picture is a PNG, also of a run where everything failed."""

import sys

import pytest

from loong_jax.config import ConfigError
from serving.bench import picture, result
from serving.bench.prompts import Item
from serving.bench.runner import Outcome, Run

HEAD = {"backend": "grpc", "dataset": "random", "num_prompts": 2}


def made(error=""):
    run = Run([Item("a", 4, 3)] * 2, duration_s=2.0)
    for index in range(2):
        pieces = [(0.1 * (index + 1), 1), (0.2 * (index + 1), 2)]
        run.outcomes[index] = Outcome(index, 0.5, 0.4, pieces, 4, 3, "abc", "length", {}, error)
    return run


@pytest.mark.parametrize("error", ["", "UNAVAILABLE: gone"])
def test_it_is_a_png(error, tmp_path):
    run, limits = made(error), {"ttft": 150.0, "tpot": 50.0}
    found = HEAD | result.summary(run, objectives_ms=limits, percentiles=(99.0,))
    picture.draw(run, found, limits, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "within objectives" in picture.title(found)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"loong-jax\[bench\]"):
        picture.draw(made(), HEAD, {}, tmp_path / "x.png")
