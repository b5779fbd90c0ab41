"""Bytes by arithmetic are the bytes of the parameters that are made."""

import math

import jax
import pytest

from loong_jax.config import ConfigError
from loong_jax.cost import memory
from loong_jax.cost.presets import MODELS
from loong_jax.model.decoder import param_structs
from loong_jax.model.hf_config import read_config
from tests.support.fixtures import FAMILY_NAMES, FIXTURES, NAMES


def made_bytes(model, tp):
    """Of one rank, as the decoder makes it."""
    leaves = jax.tree.leaves(param_structs(model, tp, stacked=False))
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_are_those_of_the_decoder(name, tp):
    model = read_config(FIXTURES / "models" / name)
    more_norms = made_bytes(model, tp) - memory.weight_bytes(model, tp)
    per_layer = 2 * model.hidden_size + 2 * model.head_dim  # of families that have more norms
    assert 0 <= more_norms <= model.num_layers * per_layer * memory.value_bytes(model)


def test_a_real_models_weights():
    model = MODELS["llama-3.1-8b"]
    assert memory.weight_bytes(model, 1) == 2 * 8_030_261_248
    assert memory.weight_bytes(model, 4) == made_bytes(model, 4)
    assert memory.kv_token_bytes(model, 1, "tpu") == 2 * 32 * 8 * 128 * 2
    assert memory.kv_token_bytes(model, 16, "tpu") == 2 * 32 * 1 * 128 * 2  # eight heads, each on two devices


@pytest.mark.parametrize(("platform", "dim"), [("tpu", 128), ("gpu", 64), ("cpu", 32)])
def test_narrow_heads_are_padded_where_kernels_want_it(platform, dim):
    model = read_config(FIXTURES / "models" / "gqa")
    assert model.head_dim == 32
    assert memory.kv_token_bytes(model, 1, platform) == 2 * model.num_layers * model.num_kv_heads * dim * 4


@pytest.mark.parametrize(
    ("text", "kind", "devices"),
    [("v5e:2x4", "v5e", 8), ("V5P:2x2x2", "v5p", 8), ("H200:8", "H200", 8), ("tpu7x:2x2x1", "tpu7x", 8),
     ("h100:1", "H100", 1)],
)  # fmt: skip
def test_topologies(text, kind, devices):
    topology = memory.topology_of(text)
    assert (topology.hardware.name, topology.num_devices) == (kind, devices)
    assert topology.platform == ("gpu" if kind[0] == "H" else "tpu")


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v5e:2x", "v5e:0", "v9:2x2", "v5e:2x2x2x2", "v5e:99999x9", "v5e:-1", "v5e:2*4"]
)
def test_topologies_that_are_none(text):
    with pytest.raises(ConfigError, match="topology: "):
        memory.topology_of(text)


def test_what_fits_and_what_is_suggested():
    model = MODELS["llama-3.1-8b"]
    found = memory.fits(model, memory.topology_of("v5e:2x4"), 0.9)
    assert [(fit.tp, fit.instances) for fit in found] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert found[0].problem == "the weights do not fit"
    two = found[1]
    assert two.room_bytes == int(0.9 * 16e9) - memory.weight_bytes(model, 2)
    assert two.instance_tokens == two.room_bytes // 65_536
    assert two.pool_tokens == 4 * two.instance_tokens
    assert two.dops == (1, 2, 3, 4)
    assert [fit.tp for fit in found if fit is memory.suggested(found, 131_072)] == [2]
    assert memory.suggested(found, 1 << 40) is max(found, key=lambda fit: fit.pool_tokens)
    tiny = memory.fits(MODELS["llama-3.1-70b"], memory.topology_of("v5e:1"), 0.9)
    assert memory.suggested(tiny, 1) is None


def test_a_tp_that_cannot_be_is_said_why():
    found = memory.fits(MODELS["llama-3.1-8b"], memory.topology_of("H100:3"), 0.9)
    assert [bool(fit.problem) for fit in found] == [False, True]
    assert "num_heads: 32 cannot be divided over tp = 3" in found[1].problem
