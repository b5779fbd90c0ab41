"""What the host packs is what a step unpacks."""

import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.esp.layout import OWN_FIELDS, Layout, bits_to_float, float_to_bits, layout_of, step_shape
from loong_jax.types import Phase, Program
from tests.support.plane import CLUSTER

VOCAB = 500


@pytest.mark.parametrize("phase", list(Phase))
def test_pack_and_unpack(phase):
    shape = step_shape(Program(phase, 2, 64), CLUSTER, "cpu", VOCAB)
    layout = layout_of(phase, shape)
    packed = np.zeros((2, layout.size), np.int32)
    rng, written = np.random.default_rng(0), {}
    for name, view in layout.views(packed).items():
        view[...] = written[name] = rng.integers(-(2**31), 2**31, view.shape, np.int32)
    assert np.count_nonzero(packed == 0) < 3, "every place belongs to a field"
    for rank in range(2):
        fields = layout.unpack(jnp.asarray(packed[rank]))
        assert fields.keys() == written.keys() == {name for name, _ in layout.fields}
        for name, value in fields.items():
            assert value.dtype == jnp.int32
            assert (np.asarray(value) == written[name][rank]).all()


def test_a_scalar_field_is_one_number():
    layout = Layout((("a", (2,)), ("b", ()), ("c", (1, 2))))
    assert layout.size == 5
    packed = np.array([[1, 2, 3, 4, 5]], np.int32)
    assert layout.views(packed)["b"].shape == (1,)
    assert int(layout.unpack(jnp.asarray(packed[0]))["b"]) == 3


def test_floats_travel_as_bits():
    values = np.array([0.0, 0.7, -1.5, np.inf, 1e-40], np.float32)
    bits = jnp.asarray(values.view(np.int32))
    assert (np.asarray(bits_to_float(bits)) == values).all()
    assert (np.asarray(float_to_bits(jnp.asarray(values))) == values.view(np.int32)).all()


def test_shapes_of_programs():
    prefill = step_shape(Program(Phase.PREFILL, 3, 64), CLUSTER, "cpu", VOCAB)
    assert (prefill.num_units, prefill.ring_pages, prefill.query_tile_units) == (4, 4, 2)
    # a chunk of fewer units than a query tile, and one that a tile does not divide
    assert step_shape(Program(Phase.PREFILL, 3, 16), CLUSTER, "cpu", VOCAB).query_tile_units == 1
    assert step_shape(Program(Phase.PREFILL, 3, 48), CLUSTER, "cpu", VOCAB).query_tile_units == 1
    decode = step_shape(Program(Phase.DECODE, 3, 8), CLUSTER, "cpu", VOCAB)
    # a step brings at most a page for each row; two for each, and some, so that a regrouped table catches up
    assert decode.num_deltas == 48
    assert layout_of(Phase.DECODE, decode).size == 8 * len(OWN_FIELDS) + 2 * 24 * 2 + 48 * 4
