"""A measured cost model on disk: what `loong profile` writes and `loong serve --cost` reads.

JSON with the coefficients, what they were measured on, and every measurement behind them. A file is not trusted: its
size is bounded, unknown fields and wrong types are refused by name, and it must be of the model that is served.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from loong_jax.config import ConfigError, LadderConfig
from loong_jax.cost.fitted import check_coefficients
from loong_jax.cost.profile import Batch
from loong_jax.cost.roofline import Shape

FORMAT = 1
_MAX_BYTES = 1 << 20


class MeasuredBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`error`: relative, of the fit that saw it."""

    batch: Batch
    seconds: float
    error: float


class CostFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`hardware`: kind and number of devices in words; `loong`: the version that measured."""

    format: int
    loong: str
    hardware: str
    shape: Shape
    tp: int
    ladder: LadderConfig
    coefficients: dict[str, float]
    measured: tuple[MeasuredBatch, ...]


def write_cost(path: Path, cost: CostFile) -> None:
    """Whole or not at all. Raises OSError."""
    check_coefficients(cost.coefficients)
    text = msgspec.json.format(msgspec.json.encode(cost), indent=1)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text + b"\n")
    os.replace(partial, path)


def read_cost(path: Path, shape: Shape, tp: int) -> CostFile:
    """The file, if it was measured with a model of this `shape` on instances of `tp` devices. Raises ConfigError that
    names the field, and OSError."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"cost: {path}: larger than {_MAX_BYTES} bytes")
    try:
        cost = msgspec.json.decode(data, type=CostFile)
        check_coefficients(cost.coefficients)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"cost: {path}: {error}") from error
    if cost.format != FORMAT:
        raise ConfigError(f"cost: {path}: format: {cost.format} is not {FORMAT}")
    if cost.tp != tp:
        raise ConfigError(f"cost: {path}: tp: measured with {cost.tp} devices an instance, not {tp}")
    for field in shape.__struct_fields__:
        if getattr(cost.shape, field) != getattr(shape, field):
            raise ConfigError(
                f"cost: {path}: shape.{field}: measured with {getattr(cost.shape, field)}, the model has "
                f"{getattr(shape, field)}"
            )
    return cost
