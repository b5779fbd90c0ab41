"""The comparison of policies: nothing is run twice, and the page says who is below whom."""

from __future__ import annotations

from pathlib import Path

import compare_policies
import pytest
from compare_policies import Case, Results, do
from comparison.page import best_by_family, write_page


def line(policy: str, attainment: float, workload: str = "mixed", load: float = 0.3) -> dict:
    key = {"kind": "grid", "policy": policy, "workload": workload, "load": load, "num_requests": 10}
    return {**key, "rate": 2 * load, "attainment": attainment, "deciles": [attainment] * 10, "cpu_s": 0.1}


def test_what_is_in_the_file_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"kind": "grid", "policy": "replicas/1024", "workload": "sharegpt", "load": 0.1, "num_requests": 20}
    first = do(Results(tmp_path / "r", ()), wanted, Case("sharegpt"), 2.0, None)
    assert first["unfinished"] == 0
    monkeypatch.setattr(compare_policies, "simulate", None)
    assert do(Results(tmp_path / "r", ()), wanted, Case("sharegpt"), 2.0, None) == first
    with pytest.raises(TypeError):
        do(Results(tmp_path / "r", {"replicas"}), wanted, Case("sharegpt"), 2.0, None)


def test_a_baseline_takes_its_better_chunk() -> None:
    lines = [line("chunked@1x8/1024", 0.7), line("chunked@1x8/4096", 0.8)]
    assert best_by_family(lines)[("mixed", 0.3)]["chunked@1x8"]["policy"] == "chunked@1x8/4096"


def test_the_page_names_every_cell_where_elastic_is_below(tmp_path: Path) -> None:
    lines = [
        line("elastic", 0.9),
        line("loongserve", 0.95),
        line("elastic", 0.9, "leval"),
        line("loongserve", 0.8, "leval"),
        line("elastic", 0.999, "lveval"),
        line("loongserve", 1.0, "lveval"),
    ]
    write_page([], lines, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "in 1 of 3 cells" in text
    assert "* mixed at 0.30: 5.0 points below loongserve" in text
    assert "* lveval at 0.30: 0.1 points below loongserve" in text
    assert (tmp_path / "comparison.png").stat().st_size > 1000
