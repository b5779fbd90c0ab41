"""The decoder: sharded and stacked forms equal the plain one."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loong_jax.config import ConfigError, ModelConfig, RopeConfig
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import (
    NO_WINDOW,
    decode_stack,
    init_params,
    layer_window,
    logits,
    param_structs,
    stack_layers,
)
from loong_jax.model.export import save_checkpoint
from loong_jax.model.oracle import Oracle, causal_attention

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)
TOKENS = np.arange(13) * 17 % 101


BIASED = msgspec.structs.replace(CONFIG, family="qwen3", qkv_bias=True, o_bias=True, windows=(4, 0))
GEMMA2 = msgspec.structs.replace(
    CONFIG, family="gemma2", windows=(0, 4), attn_soft_cap=5.0, logit_soft_cap=3.0, query_scalar=9
)
GEMMA3 = msgspec.structs.replace(
    CONFIG, family="gemma3_text", windows=(3, 0), rope=RopeConfig(1e5, "linear", 2.0), window_rope=RopeConfig(10.0)
)
FAMILY_CONFIGS = [CONFIG, BIASED, GEMMA2, GEMMA3]


def attention(config):
    """The oracle's, with a window that may be traced, counting its calls."""

    def attend(carry, layer, q, k, v):
        window = layer_window(config, layer)
        out = causal_attention(q, k, v, scale=config.attention_scale, window=window, soft_cap=config.attn_soft_cap)
        return out, carry + 1

    return attend


@pytest.mark.parametrize("config", FAMILY_CONFIGS, ids=lambda config: config.family)
def test_stacked_layers_equal_a_list_of_layers(config):
    params, attend = random_params(config), attention(config)

    def run(params):
        hidden, calls = decode_stack(params, config, jnp.asarray(TOKENS), jnp.arange(13), attend, jnp.int32(0))
        return logits(params, config, hidden), calls

    listed, calls = jax.jit(run)(params)
    stacked, calls_stacked = jax.jit(run)(stack_layers(params))
    np.testing.assert_allclose(stacked, listed, atol=1e-5)
    assert calls == calls_stacked == config.num_layers
    np.testing.assert_allclose(
        jax.nn.log_softmax(listed), Oracle(config, params).logprobs(TOKENS), atol=1e-5, err_msg="the oracle's windows"
    )


@pytest.mark.parametrize("config", FAMILY_CONFIGS[1:], ids=lambda config: config.family)
def test_bfloat16_is_near_float32(config):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(config))
    rounded = Oracle(msgspec.structs.replace(config, dtype="bfloat16"), params).logprobs(TOKENS)
    exact = Oracle(config, jax.tree.map(lambda a: a.astype(jnp.float32), params)).logprobs(TOKENS)
    assert 1e-5 < np.abs(rounded - exact).max() < 0.1


def random_params(config):
    """Also the norms, which start as ones."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), init_params(config, 0))


def test_windows_are_constants_unless_scanned_layers_differ():
    window = lambda config, layer: layer_window(config, layer)
    assert window(CONFIG, 0) is window(CONFIG, jnp.int32(0)) is None
    same = msgspec.structs.replace(CONFIG, windows=(4, 4))
    assert window(same, 1) == window(same, jnp.int32(1)) == 4
    assert (window(BIASED, 0), window(BIASED, 1)) == (4, NO_WINDOW)
    traced = [window(BIASED, jnp.int32(layer)) for layer in range(2)]
    assert all(isinstance(value, jax.Array) for value in traced)
    assert [int(value) for value in traced] == [4, NO_WINDOW]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("config", "tp", "tied"),  # 4 ranks share 2 KV heads; 101 is padded
    [(CONFIG, 2, True), (CONFIG, 4, False), (BIASED, 4, False), (GEMMA3, 2, True)],
    ids=lambda value: value.family if isinstance(value, ModelConfig) else str(value),
)
def test_tensor_parallel_equals_one_device(tmp_path, config, tp, tied, stacked):
    config = msgspec.structs.replace(config, tie_embeddings=tied)
    params, attend = random_params(config), attention(config)
    save_checkpoint(tmp_path, config, params)
    ranks = load_checkpoint(tmp_path, config, tp=tp, devices=[jax.devices()[:tp]], stacked=stacked)[0]
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))

    def assemble(struct, *shards):
        return jax.make_array_from_single_device_arrays(struct.shape, jax.NamedSharding(mesh, P("tp")), list(shards))

    sharded = jax.tree.map(assemble, param_structs(config, tp, stacked=stacked), *ranks)

    def run(params):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        hidden, _ = decode_stack(params, config, jnp.asarray(TOKENS), jnp.arange(13), attend, 0, tp_axis="tp")
        return jax.nn.log_softmax(logits(params, config, hidden, tp_axis="tp"))

    step = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("tp"), out_specs=P(), check_vma=False))
    np.testing.assert_allclose(step(sharded), Oracle(config, params).logprobs(TOKENS), atol=2e-5)


def test_few_leaves_a_layer():
    structs = param_structs(CONFIG, 2, stacked=False)
    assert len(structs["layers"]) == CONFIG.num_layers
    assert len(jax.tree.leaves(structs["layers"][0])) == 6
    assert structs["embed"].shape == (2, 51, 64)
    assert structs["layers"][0]["qkv"].shape == (2, 64, 64)
    assert param_structs(CONFIG, 2, stacked=True)["layers"]["o"].shape == (2, 2, 32, 64)


@pytest.mark.parametrize(
    ("change", "tp", "field"),
    [({}, 3, "num_heads"), ({"intermediate_size": 97}, 2, "intermediate_size")],
)
def test_indivisible_sizes_are_refused_by_name(change, tp, field):
    with pytest.raises(ConfigError, match=field):
        param_structs(msgspec.structs.replace(CONFIG, **change), tp, stacked=False)


def test_kv_heads_that_do_not_fit_the_ranks_are_refused():
    config = msgspec.structs.replace(CONFIG, num_heads=12, num_kv_heads=6)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        param_structs(config, 4, stacked=False)


def test_initialisation_depends_on_the_seed_alone():
    first, again, other = init_params(CONFIG, 1), init_params(CONFIG, 1), init_params(CONFIG, 2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])
