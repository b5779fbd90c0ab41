"""The composition's pure parts; the composed engine itself runs in test_launch.py."""

import msgspec
import pytest

from loong_jax.config import ClusterConfig, ConfigError, LimitsConfig, ladder_for
from loong_jax.eventlog import read_event_log
from loong_jax.types import Phase
from serving.engine import (
    Engine,
    EngineConfig,
    for_model,
    kv_token_bytes,
    read_model,
    validation_limits,
    wanted_programs,
)
from tests.support.tiny_checkpoint import CONFIG, make_tiny_checkpoint

CLUSTER = ClusterConfig(num_instances=4, ladder=ladder_for(4))


def config(**fields) -> EngineConfig:
    return EngineConfig(**{"cluster": CLUSTER, "limits": LimitsConfig(), **fields})


def test_instances_are_dealt_evenly():
    assert config().owners == (0, 0, 0, 0)
    assert config(num_processes=2, coordinator="c:1").owners == (0, 0, 1, 1)
    for fields, words in (
        ({"num_processes": 3, "coordinator": "c:1"}, "num_processes: "),
        ({"num_processes": 0}, "num_processes: "),
        ({"num_processes": 2}, "coordinator: "),
        ({"policy": "best"}, "policy: "),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**fields)


def test_the_configuration_travels_to_workers():
    sent = config(num_processes=4, coordinator="c:1", dtype="bfloat16", full_warm_up=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=EngineConfig) == sent


def test_the_minimal_ladder_is_dop_1_and_the_largest():
    needed, others = wanted_programs(CLUSTER, "cpu", full=False)
    assert {program.dop for program, _ in needed} == {1, 4}
    assert {program.dop for program, _ in others} == {1, 2, 3}
    assert {program.phase for program, _ in needed} == {Phase.PREFILL, Phase.DECODE}
    assert {instances for program, instances in needed if program.dop == 1} == {(0,)}
    assert {instances for program, instances in others if program.dop == 1} == {(1,), (2,), (3,)}
    assert others[0][0].dop == 1, "what comes to other sets from memory is first"
    everything, nothing = wanted_programs(CLUSTER, "cpu", full=True)
    assert set(everything) == {*needed, *others}
    assert nothing == []


def test_sizes_and_limits():
    assert kv_token_bytes(CONFIG) == 2 * 2 * 2 * 16 * 4
    assert kv_token_bytes(msgspec.structs.replace(CONFIG, dtype="bfloat16")) == 2 * 2 * 2 * 16 * 2
    limits = validation_limits(CONFIG, CLUSTER)
    assert (limits.vocab_size, limits.max_position, limits.eos_ids) == (258, 8192, (257,))
    assert limits.max_context_tokens == 8192
    assert validation_limits(CONFIG, ClusterConfig(num_instances=1, pages_per_instance=4, ladder=ladder_for(1)))


def test_a_window_lets_requests_outgrow_the_pool():
    windowed = msgspec.structs.replace(CONFIG, windows=(40,) * CONFIG.num_layers)
    small = ClusterConfig(num_instances=1, pages_per_instance=8, ladder=ladder_for(1))
    for model, context in ((CONFIG, 129), (windowed, 8192)):
        cluster = for_model(config(cluster=small), model).cluster
        assert cluster.kv_window == model.kv_window
        assert validation_limits(model, cluster).max_context_tokens == context
    narrow = msgspec.structs.replace(CONFIG, windows=(100,) * CONFIG.num_layers)
    cluster = for_model(config(cluster=small), narrow).cluster
    assert validation_limits(narrow, cluster).max_context_tokens == 129, "not even a window fits with room to move"


def test_the_dtype_asked_for_wins(tmp_path):
    make_tiny_checkpoint(tmp_path)
    assert read_model(tmp_path, None).dtype == "float32"
    assert read_model(tmp_path, "bfloat16").dtype == "bfloat16"


def test_the_event_log_begins_with_what_a_replay_needs(tmp_path):
    path = tmp_path / "events.log"
    engine = Engine(config(), CONFIG, event_log=path, on_ready=lambda: None, on_crash=lambda message: None)
    engine.loop.close()
    del engine
    header, frames = read_event_log(path)
    assert (header.cluster, header.policy, list(frames)) == (CLUSTER, "elastic", [])


def test_an_unwritable_event_log_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="no-such-folder"):
        Engine(
            config(),
            CONFIG,
            event_log=tmp_path / "no-such-folder" / "log",
            on_ready=lambda: None,
            on_crash=lambda message: None,
        )
