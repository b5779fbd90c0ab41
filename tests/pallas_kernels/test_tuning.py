"""Measured sizes: the file, which of it fits, and that ops take it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import flash_partial, tuning
from pallas_kernels.chips import current_device_kind
from pallas_kernels.tuning import Tuned

SHAPE = {"tok": 1024, "ctx": 4096, "group": 4, "dim": 128}


def measured(**changes) -> Tuned:
    fields = {"chip": "TPU v5e", "op": "flash_partial", "implementation": "tpu", "shape": SHAPE, "sizes": {}} | changes
    pairs = {name: tuple(sorted(fields[name].items())) for name in ("shape", "sizes")}
    return Tuned(**fields | pairs)


def sizes_for(records, shape=SHAPE, chip="TPU v5e", implementation="tpu"):
    return tuning.sizes_for(tuple(records), chip, "flash_partial", implementation, shape)


def test_a_file_says_what_was_written():
    records = (measured(sizes={"block_q": 256}), measured(chip="NVIDIA H200", sizes={"weights_in_registers": 1}))
    assert tuning.parse(tuning.dump(records)) == records
    assert tuning.parse("") == ()


def test_the_nearest_measurement_of_the_same_kind_is_taken():
    records = [
        measured(shape=SHAPE | {"tok": 128}, sizes={"block_q": 128}),
        measured(shape=SHAPE | {"tok": 2048}, sizes={"block_q": 512}),
        measured(shape=SHAPE | {"dim": 64}, sizes={"block_q": 1}),
    ]
    assert sizes_for(records) == {"block_q": 512}
    assert sizes_for(records, SHAPE | {"tok": 256}) == {"block_q": 128}
    assert sizes_for(records, SHAPE | {"group": 1}) == {}
    assert sizes_for(records, chip="TPU v6e") == sizes_for(records, implementation="gpu") == sizes_for([]) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "kernel sizes: no JSON"),
        ("{}", "kernel sizes: must be a list"),
        ('[{"chip": "x"}]', r"kernel sizes\[0\]: must have exactly chip, op"),
        ('[{"chip": 1, "op": "", "implementation": "", "shape": {}, "sizes": {}}]', r"\[0\]: chip, op and"),
        ('[{"chip": "", "op": "", "implementation": "", "shape": {}, "sizes": {"a": -1}}]', r"\[0\].sizes: an object"),
        ('[{"chip": "", "op": "", "implementation": "", "shape": [], "sizes": {}}]', r"\[0\].shape: an object"),
        (" " * (tuning.MAX_BYTES + 1), "kernel sizes: 1048577 characters"),
    ],
)
def test_what_is_wrong_is_named(text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        tuning.parse(text)


def test_an_op_takes_what_was_measured_here_and_refuses_what_can_not_be():
    """Sizes of the TPU kernel are checked when it is traced, so a wrong one shows that it arrived."""
    q, kv = jnp.zeros((128, 2, 64)), jnp.zeros((128, 1, 64))
    labels = [jnp.zeros(128, jnp.int32)] * 4
    shape = {"tok": 128, "ctx": 128, "group": 2, "dim": 64}
    records = (measured(chip=current_device_kind(), shape=shape, sizes={"block_q": 100}),)

    def trace(records):
        run = lambda: flash_partial.flash_partial(q, kv, kv, *labels, scale=1.0, platform="tpu", tuning=records)
        return jax.eval_shape(run)

    assert trace(()).out.shape == q.shape
    with pytest.raises(ValueError, match="block_q: must be a positive multiple of 128, not 100"):
        trace(records)
