"""The table of families has no two rows for one name, and names every tensor apart."""

import msgspec
import pytest

from loong_jax.config import ModelConfig
from loong_jax.model.families import FAMILIES, family_of


def test_rows_are_distinct():
    assert (
        len({family.name for family in FAMILIES}) == len({family.architecture for family in FAMILIES}) == len(FAMILIES)
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tensor_names_are_distinct(family):
    names = [
        value
        for value in msgspec.structs.astuple(family)
        if isinstance(value, str) and value.endswith((".weight", ".bias"))
    ]
    assert len(names) == len(set(names)) == 18 + 2 * family.post_norms
    assert all(("{layer}" in name) == name.startswith("model.layers.") for name in names)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_configuration_names_its_row(family):
    assert family_of(ModelConfig(family.name, 101, 64, 96, 2, 4, 2, 16, 4096)) is family
