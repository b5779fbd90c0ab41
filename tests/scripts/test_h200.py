"""scripts/h200.py on a CPU: every measurement in a tiny size, and what the run does when one hangs, dies or fails.

What it is not: any figure of a GPU (docs/h200.md).
"""

import sys
from pathlib import Path

import h200
import msgspec
import pytest
from on_gpu.figures import Figures, Share

FAKE = """
import json, os, sys, time
print(json.dumps({"machine": "none"}), flush=True)
for line in sys.stdin:
    item = line.strip()
    if "hang" in item: time.sleep(600)
    if "die" in item: os._exit(3)
    print("noise", flush=True)
    print(json.dumps({"error": "no"} if "wrong" in item else {"figures": {"numbers": {"n": 1.0}}}), flush=True)
"""


@pytest.mark.parametrize("part", h200.PARTS)
def test_every_part_measures(part: str):
    items = h200.items_of([part], tiny=True)
    for item in items[:1] if part == "conformance" else items:
        figures = h200.measure(item, True, "")
        assert figures.numbers
        assert all(value == value and value >= 0 for value in figures.numbers.values()), figures
        assert not figures.notes, figures
    if part == "prefill":
        assert figures.numbers["loong_ms"] > 0 < figures.numbers["xla_ms"]


def test_on_a_gpu_there_is_more_to_measure():
    items = h200.items_of(h200.PARTS, tiny=False)
    assert len(items) == len(set(items))
    assert {"prefill/32K", "prefill/128K", "engine/prefill 128K", "engine/decode 128 x 4K"} <= set(items)
    conformance = [item for item in items if item.startswith("conformance/")]
    assert "conformance/flash_partial bf16 striped in registers" in conformance
    assert not [item for item in conformance if item.endswith("page 3")], "declared unsupported"
    assert len(conformance) > 40


def run(items: list[str], limit_s: float = 60.0, item_s: float = 30.0) -> tuple[list[h200.Result], bool, int]:
    """Results, whether it finished, and how many children it took."""
    kept: list[h200.Result] = []
    children: list[h200.Child] = []

    def start() -> h200.Child:
        children.append(h200.Child([sys.executable, "-c", FAKE]))
        return children[-1]

    finished = h200.measure_all(items, start, kept.append, limit_s, item_s)
    return kept, finished, len(children)


def test_one_that_dies_or_fails_costs_no_other():
    kept, finished, num_children = run(["a/1", "a/die", "a/wrong", "a/2"])
    assert finished
    assert num_children == 2
    assert [(result.item, result.error) for result in kept] == [
        ("a/1", ""), ("a/die", "the process ended with 3"), ("a/wrong", "no"), ("a/2", ""),
    ]  # fmt: skip
    assert kept[3].figures == Figures({"n": 1.0})
    assert {result.machine for result in kept} == {"none"}


def test_one_that_hangs_is_ended():
    kept, finished, num_children = run(["a/hang", "a/1"], item_s=1.0)
    assert (finished, num_children) == (True, 2)
    assert [result.error for result in kept] == ["no answer in 1 s", ""]


def test_a_run_ends_in_time_and_says_nothing_of_what_it_cut_short():
    kept, finished, _ = run(["a/1", "a/hang", "a/2"], limit_s=4.0)
    assert not finished
    assert [result.item for result in kept] == ["a/1"]


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path, monkeypatch, capsys):
    """What failed is tried again, what is known is not; results of another machine are not mixed in."""
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(h200, "items_of", lambda parts, tiny: ["a/1", "a/wrong"])
    asked: list[list[str]] = []

    def measure_all(items, start, keep, limit_s, item_s):
        asked.append(items)
        for item in items:
            figures, error = (None, "no") if len(asked) == 1 and "wrong" in item else (Figures({"n": 1.0}), "")
            keep(h200.Result(item, "none", 1.0, figures, error))
        return True

    monkeypatch.setattr(h200, "measure_all", measure_all)
    assert h200.main(["--out", str(out)]) == 1
    assert "a/wrong (1 s): FAILED: no" in capsys.readouterr().out
    assert h200.main(["--out", str(out), "--json"]) == 0
    assert asked == [["a/1", "a/wrong"], ["a/wrong"]]
    said = msgspec.json.decode(capsys.readouterr().out)
    assert said["finished"]
    assert [result["item"] for result in said["results"]] == ["a/1", "a/wrong"]
    monkeypatch.undo()
    out.write_bytes(msgspec.json.encode(h200.Result("prefill/256", "another", 1.0, None, "no")) + b"\n")
    monkeypatch.setattr(h200, "Child", lambda command: StandIn())
    with pytest.raises(SystemExit):
        h200.main(["--out", str(out), "--tiny", "--only", "prefill"])
    assert "holds results of another, not of none" in capsys.readouterr().err


class StandIn:
    machine = "none"

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "prefill,dance"], "--only: 'dance' is none of"), (["--limit-s", "0"], "must be positive")],
)
def test_refusals_name_the_flag(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        h200.main(words)
    assert message in capsys.readouterr().err


def test_figures_in_words():
    figures = Figures(
        {"loong_ms": 1.5}, (Share("speed over x's", 0.8, 0.9), Share("of the copy", 0.9, 0.85)), ("note",)
    )
    assert figures.in_words == (
        "loong_ms 1.5; speed over x's 0.800 (at least 0.9: missed); of the copy 0.900 (at least 0.85: met); note"
    )
