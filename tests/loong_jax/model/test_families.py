"""The table of families has no two rows for one name, and names every tensor apart."""

import msgspec

from loong_jax.model.families import FAMILIES


def test_rows_are_distinct():
    assert (
        len({family.name for family in FAMILIES}) == len({family.architecture for family in FAMILIES}) == len(FAMILIES)
    )


def test_tensor_names_are_distinct():
    for family in FAMILIES:
        names = [
            value for value in msgspec.structs.astuple(family) if isinstance(value, str) and value.endswith(".weight")
        ]
        assert len(names) == len(set(names)) == 12
        assert all(("{layer}" in name) == name.startswith("model.layers.") for name in names)
