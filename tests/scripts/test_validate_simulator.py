"""The validation finds a step law again that made the times, and says so when the second half obeys another."""

import json
import random
from pathlib import Path

import pytest
import validate_simulator as script

LAW = (0.012, 4.5e-5, 3e-5, 8e-8)


def measured_by(law: tuple[float, ...], num: int = 40) -> list[script.Measured]:
    """What an engine of that law would have shown."""
    rng = random.Random(0)
    asked = [script.Measured(rng.randint(200, 3000), rng.randint(30, 60), 0.05 * i, 0.0, 0.0) for i in range(num)]
    outcomes = script.simulate(asked, law).outcomes
    return [
        m._replace(first_s=o.first_us * 1e-6, last_s=o.last_us * 1e-6) for m, o in zip(asked, outcomes, strict=True)
    ]


def write(folder: Path, measured: list[script.Measured]) -> None:
    """The engine's clock is another than that of the arrivals."""
    path = folder / script.FILE
    path.parent.mkdir()
    rows = [
        {
            "input_toks": m.prompt_len, "output_toks": m.output_len, "arrival_time": 1e9 + m.arrived_s,
            "queued_ts": 500.0 + m.arrived_s, "first_token_ts": 500.0 + m.first_s, "last_token_ts": 500.0 + m.last_s,
        }
        for m in measured
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_known_law_is_found_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, measured_by(LAW))
    assert script.main(["--traces", str(tmp_path)]) == 0
    assert "second half (predicted)" in capsys.readouterr().out
    fitted = script.fit_first_half(script.read(tmp_path / script.FILE))
    times, truth = script.IterationTimes(fitted), script.IterationTimes(LAW)
    assert times.decode_s(1, 30, 30, 60_000) == pytest.approx(truth.decode_s(1, 30, 30, 60_000), rel=0.03)
    assert times.prefill_s(1, 2000, 0, 0, None) == pytest.approx(truth.prefill_s(1, 2000, 0, 0, None), rel=0.03)


def test_a_second_half_that_is_slower_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fast, slow = measured_by(LAW), measured_by((0.024, *LAW[1:]))
    write(tmp_path, fast[:20] + slow[20:])
    assert script.main(["--traces", str(tmp_path)]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_iterations_join_what_ran_together() -> None:
    """Two prompts of 200 tokens, the second while the first decodes: its chunk shares an iteration with a row."""
    measured = [script.Measured(200, 4, 0.0, 0.0, 0.0), script.Measured(300, 2, 0.03, 0.0, 0.0)]
    features = [i.features for i in script.iterations(script.simulate(measured, LAW))]
    assert features[0] == (1, 200, 0, 0)
    assert (1, 300, 1, 203) in features
