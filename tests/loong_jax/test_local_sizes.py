"""What a rank holds, and which tp a model cannot be divided by."""

import msgspec
import pytest

from loong_jax.config import ConfigError
from loong_jax.cost.presets import MODELS
from loong_jax.local_sizes import local_sizes

MODEL = MODELS["llama-3.1-8b"]


def test_heads_are_divided_and_kv_heads_replicated():
    two, sixteen = local_sizes(MODEL, 2), local_sizes(MODEL, 16)
    assert (two.num_heads, two.num_kv_heads, two.heads_and_kv) == (16, 4, 24)
    assert (sixteen.num_heads, sixteen.num_kv_heads) == (2, 1)
    assert local_sizes(msgspec.structs.replace(MODEL, vocab_size=101), 2).vocab_size == 51


@pytest.mark.parametrize(("tp", "field"), [(3, "num_heads"), (64, "num_heads")])
def test_what_cannot_be_divided_is_named(tp, field):
    with pytest.raises(ConfigError, match=field):
        local_sizes(MODEL, tp)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        local_sizes(msgspec.structs.replace(MODEL, num_heads=24, num_kv_heads=8, intermediate_size=12), 3)
