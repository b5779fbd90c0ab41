"""State changes groups without moving; what was lost is made anew, and only that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.esp.groups import Devices
from loong_jax.instance_states import GroupWeights, InstanceStates, StateLost
from loong_jax.kv_pool import state_structs

MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
)
CLUSTER = ClusterConfig(
    num_instances=4, tp=2, pages_per_instance=6, page_tokens=4, ring_tokens=8, query_tile_tokens=8, slots=6,
    ladder=LadderConfig(dops=(1, 2), prefill_tokens=(16,)),
)  # fmt: skip


@pytest.fixture
def devices():
    return Devices(jax.devices(), CLUSTER.num_instances, CLUSTER.tp)


@pytest.fixture
def states(devices):
    return InstanceStates(devices, MODEL, CLUSTER, "cpu")


def mark(states: InstanceStates, group: tuple[int, ...]) -> None:
    """Write each instance's number into its tokens, as a step would."""
    state = states.take(group)
    numbers = np.array(group, np.int32)[:, None, None]
    put = jax.jit(lambda t: t * 0 + numbers, donate_argnums=0, out_shardings=state.tokens.sharding)
    states.put(group, state._replace(tokens=put(state.tokens)))


def numbers(states: InstanceStates) -> list[int]:
    out = []
    for instance in range(CLUSTER.num_instances):
        values = np.unique(np.asarray(states.take((instance,)).tokens))
        assert len(values) == 1
        out.append(int(values[0]))
    return out


def test_regrouping_moves_nothing(states, devices):
    """Any sequence of groups: the same buffers, each on its instance's devices, with its own content."""
    before = states.pool_pointers()
    assert sorted(before) == [0, 1, 2, 3]
    assert all(len(set(pointers)) == CLUSTER.tp for pointers in before.values())
    for group in ((0, 1, 2, 3), (1,), (0, 3), (2, 3), (0, 1), (0, 1, 2), (1, 2, 3)):
        mark(states, group)
        view = states.take(group)
        structs = state_structs(MODEL, CLUSTER, len(group), "cpu")
        for array, struct in zip(view, structs, strict=True):
            assert (array.shape, array.dtype) == (struct.shape, struct.dtype)
            assert array.sharding.mesh == devices.mesh(group)
        assert states.pool_pointers() == before
    assert numbers(states) == [0, 1, 2, 3]


def test_a_view_in_use_is_kept(states):
    assert states.take((0, 1)) is states.take((0, 1))


def test_upload_table_changes_one_member(states):
    entries = np.arange(CLUSTER.table_entries * 3, dtype=np.int32).reshape(-1, 3)
    before = states.pool_pointers()
    states.take((0, 2, 3))
    states.upload_table((0, 2, 3), 1, entries)
    table = np.asarray(states.take((0, 2, 3)).table)
    assert (table[1] == entries).all()
    assert not table[[0, 2]].any()
    assert states.pool_pointers() == before


def test_reset_of_a_member_leaves_the_others(states):
    mark(states, (0, 1, 2, 3))
    before = states.pool_pointers()
    states.reset((2,))
    after = states.pool_pointers()
    assert {i: after[i] for i in (0, 1, 3)} == {i: before[i] for i in (0, 1, 3)}
    assert numbers(states) == [0, 1, 0, 3]


def lose(states: InstanceStates, group: tuple[int, ...]) -> None:
    """What a step that fails after donation leaves."""
    for array in states.take(group):
        array.delete()


def test_reset_after_a_lost_step(states):
    mark(states, (0, 1, 2, 3))
    before = states.pool_pointers()
    lose(states, (1, 2))
    states.reset((1, 2))
    after = states.pool_pointers()
    assert {i: after[i] for i in (0, 3)} == {i: before[i] for i in (0, 3)}
    assert sorted(after) == [0, 1, 2, 3]
    assert numbers(states) == [0, 0, 0, 3]


@pytest.mark.parametrize("wanted", [(0, 1), (1, 2), (0, 1, 2, 3), (2, 3)])
def test_a_group_with_a_lost_member_is_refused_and_its_other_members_keep_theirs(states, wanted):
    mark(states, (0, 1, 2, 3))
    states.take((0,))
    states.take((3,))
    lose(states, (1, 2))
    with pytest.raises(StateLost, match=r"\(1, 2\)"):
        states.take(wanted)
    states.reset((1, 2))
    assert numbers(states) == [0, 0, 0, 3]


def test_fresh_state_is_zero(states):
    for array in states.take((0, 1, 2, 3)):
        assert not np.asarray(array).any()


def test_weights_of_groups_are_views(devices):
    """Groups share one copy per instance; every tp rank sees its own shard."""
    weights = [
        [{"w": jax.device_put(jnp.full((1, 3), 10.0 * i + r), d)} for r, d in enumerate(ds)]
        for i, ds in enumerate(devices.by_instance)
    ]
    views = GroupWeights(devices, weights)
    pointers = {tree["w"].unsafe_buffer_pointer() for row in weights for tree in row}
    for group in ((0, 1), (1, 3)):
        view = views.view(group)["w"]
        assert view.shape == (2, 3)
        assert views.view(group)["w"] is view
        for shard in view.addressable_shards:
            assert shard.data.unsafe_buffer_pointer() in pointers
            instance = next(i for i, ds in enumerate(devices.by_instance) if shard.device in ds)
            rank = devices.by_instance[instance].index(shard.device)
            assert np.asarray(shard.data).tolist() == [[10.0 * instance + rank] * 3]
