"""The decoder: sharded and stacked forms equal the plain one."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loong_jax.config import ConfigError, ModelConfig
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import decode_stack, init_params, logits, param_structs, stack_layers
from loong_jax.model.export import save_checkpoint
from loong_jax.model.oracle import Oracle, causal_attention

CONFIG = ModelConfig("llama", 101, 64, 96, 2, 4, 2, 16, 4096)
TOKENS = np.arange(13) * 17 % 101


def attend(carry, layer, q, k, v):
    return causal_attention(q, k, v), carry + 1


def test_stacked_layers_equal_a_list_of_layers():
    params = init_params(CONFIG, 0)

    def run(params):
        hidden, calls = decode_stack(params, CONFIG, jnp.asarray(TOKENS), jnp.arange(13), attend, jnp.int32(0))
        return logits(params, CONFIG, hidden), calls

    listed, calls = jax.jit(run)(params)
    stacked, calls_stacked = jax.jit(run)(stack_layers(params))
    np.testing.assert_allclose(stacked, listed, atol=1e-5)
    assert calls == calls_stacked == CONFIG.num_layers


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("tp", "tied"), [(2, True), (4, False)])  # 4 ranks share 2 KV heads; 101 is padded
def test_tensor_parallel_equals_one_device(tmp_path, tp, tied, stacked):
    config = msgspec.structs.replace(CONFIG, tie_embeddings=tied)
    params = init_params(config, 0)
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
