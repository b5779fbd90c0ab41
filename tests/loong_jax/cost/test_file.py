"""Cost files: what was written is read, and everything else is refused by the name of its field."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from loong_jax.config import ConfigError, LadderConfig
from loong_jax.cost.calibration import LLAMA_2_7B
from loong_jax.cost.file import FORMAT, CostFile, MeasuredBatch, read_cost, write_cost
from loong_jax.cost.profile import Batch
from loong_jax.cost.roofline import shape_of
from loong_jax.cost.unmeasured import unmeasured

SHAPE = shape_of(LLAMA_2_7B)
COST = CostFile(
    FORMAT, "0.1", "2 x cpu", SHAPE, 2, LadderConfig(), dict(unmeasured().coefficients),
    (MeasuredBatch(Batch("decode", 1, 8, 1, 16), 0.5, 0.01),),
)  # fmt: skip


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_cost(tmp_path / "cost.json", COST)
    assert read_cost(tmp_path / "cost.json", SHAPE, 2) == COST
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


def changed(path: Path, *keys: str, value: object) -> Path:
    data = json.loads(msgspec.json.encode(COST))
    place = data
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[keys[-1]] = value
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("format",), 2, "format: 2"),
        (("format",), "1", r"\$\.format"),
        (("tp",), 4, "tp: measured with 4"),
        (("shape", "num_layers"), 8, r"shape\.num_layers: measured with 8, the model has 32"),
        (("coefficients", "decode_row_s.1"), -1.0, r"decode_row_s\.1: -1"),
        (("coefficients", "decode_row_s.1"), None, r"\$\.coefficients"),
        (("coefficients", "speed"), 1.0, "speed: no such"),
        (("measured", "0", "batch", "phase"), "dance", "batch.phase"),
        (("measured", "0", "seconds"), "x", "seconds"),
        (("ladder", "dops"), [2], "dops"),
        (("extra",), 1, "extra"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: tuple[str, ...], value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_cost(changed(tmp_path / "cost.json", *keys, value=value), SHAPE, 2)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b'{"format": 1}'])
def test_what_is_no_cost_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cost.json").write_bytes(data)
    with pytest.raises(ConfigError, match="cost: "):
        read_cost(tmp_path / "cost.json", SHAPE, 2)


def test_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        read_cost(tmp_path / "cost.json", SHAPE, 2)


def test_nothing_wrong_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        write_cost(tmp_path / "cost.json", msgspec.structs.replace(COST, coefficients={"decode_row_s.1": 1.0}))
    assert not list(tmp_path.iterdir())
