"""Sizes of kernels as measured, instead of what heuristics choose: a file of them, and which of it fits a call.

`scripts/tune_kernels.py` writes the file: per chip, op, implementation and shape the sizes that were fastest. What it
is not: a search, or anything that is looked up by itself: who calls an op passes the tuning.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

MAX_BYTES = 1 << 20
FIELDS = ("chip", "op", "implementation", "shape", "sizes")
NEAREST = ("tok", "ctx", "rows")
"""Numbers of a shape by which the nearest measurement is taken; all others must be equal."""


class Tuned(NamedTuple):
    """One measurement. `chip`: as JAX names the device kind. `shape`, `sizes`: sorted (name, number) pairs."""

    chip: str
    op: str
    implementation: str
    shape: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[str, int], ...]


Tuning = tuple[Tuned, ...]
"""Hashable, so that it may be static in a program."""


def _numbers(value: Any, field: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, dict) or not all(type(n) is int and n >= 0 for n in value.values()):
        raise ValueError(f"{field}: an object of names and whole numbers, not {value!r}"[:300])
    return tuple(sorted(value.items()))


def parse(text: str) -> Tuning:
    """From JSON: a list of objects with FIELDS. Raises ValueError that names what is wrong; empty text is no tuning."""
    if not text:
        return ()
    if len(text) > MAX_BYTES:
        raise ValueError(f"kernel sizes: {len(text)} characters, more than {MAX_BYTES}")
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"kernel sizes: no JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError("kernel sizes: must be a list")
    tuning = []
    for index, record in enumerate(records):
        if not isinstance(record, dict) or set(record) != set(FIELDS):
            raise ValueError(f"kernel sizes[{index}]: must have exactly {', '.join(FIELDS)}")
        names = [record[field] for field in FIELDS[:3]]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"kernel sizes[{index}]: chip, op and implementation must be text")
        numbers = (_numbers(record[field], f"kernel sizes[{index}].{field}") for field in FIELDS[3:])
        tuning.append(Tuned(*names, *numbers))
    return tuple(tuning)


def dump(tuning: Tuning) -> str:
    """The file's text; `parse` takes it."""
    records = [tuned._asdict() | {"shape": dict(tuned.shape), "sizes": dict(tuned.sizes)} for tuned in tuning]
    return json.dumps(records, indent=1) + "\n"


def _distance(measured: dict[str, int], shape: Mapping[str, int]) -> float:
    """Infinite where another number than those of NEAREST differs."""
    if measured.keys() != shape.keys() or any(measured[n] != shape[n] for n in shape if n not in NEAREST):
        return math.inf
    return sum(abs(math.log2(max(measured[n], 1) / max(shape[n], 1))) for n in shape if n in NEAREST)


def sizes_for(tuning: Tuning, chip: str, op: str, implementation: str, shape: Mapping[str, int]) -> dict[str, int]:
    """The sizes measured for the nearest shape; none where nothing like it was."""
    fits = [
        (_distance(dict(tuned.shape), shape), tuned)
        for tuned in tuning
        if (tuned.chip, tuned.op, tuned.implementation) == (chip, op, implementation)
    ]
    distance, nearest = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
    return dict(nearest.sizes) if nearest is not None and math.isfinite(distance) else {}


def tuned(
    implementations: Mapping[str, Callable[..., Any]], tuning: Tuning, chip: str, op: str, shape: Mapping[str, int]
) -> dict[str, Callable[..., Any]]:
    """The implementations with the sizes measured for `shape`, where there are any."""
    return {
        name: partial(function, **sizes_for(tuning, chip, op, name, shape))
        for name, function in implementations.items()
    }
