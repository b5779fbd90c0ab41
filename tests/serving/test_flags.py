"""From flags to configurations: what is wrong is refused by name."""

import pytest

from loong_jax.config import ConfigError
from serving import flags
from serving.flags import cluster_config, limits_config, numbers, one_of

GOOD = {
    "platform": "default",
    "instances": 8,
    "tp": 2,
    "pool_tokens": 65_000,
    "page_tokens": 16,
    "ring_tokens": 512,
    "max_running": 64,
    "dops": "auto",
    "prefill_buckets": "128,512",
    "decode_buckets": "1,8",
}


def test_good_flags():
    cluster = cluster_config(**GOOD)
    assert cluster.ladder.dops == (1, 2, 3, 4, 8)
    assert (cluster.ladder.prefill_tokens, cluster.ladder.decode_rows) == ((128, 512), (1, 8))
    assert cluster.pool_tokens >= GOOD["pool_tokens"] > cluster.pool_tokens - 8 * 16
    assert (cluster.tp, cluster.slots) == (2, 64)
    assert cluster_config(**{**GOOD, "dops": "1,8"}).ladder.dops == (1, 8)
    assert cluster_config(**{**GOOD, "instances": 6}).ladder.dops == (1, 2, 3, 4, 6)
    auto = {**GOOD, "prefill_buckets": "auto", "decode_buckets": "auto"}
    assert cluster_config(**auto).ladder.num_programs == 47
    cpu = {**auto, "platform": "cpu"}
    assert cluster_config(**cpu).ladder.num_programs == 17
    sizes = [cluster_config(**{**cpu, "instances": n}).ladder for n in (1, 2, 3)]
    assert [ladder.prefill_tokens for ladder in sizes] == [(512, 2048), (512, 2048), (512,)]
    assert [ladder.decode_rows for ladder in sizes] == [(1, 8, 32), (1, 8, 32), (8,)]
    assert cluster_config(**{**auto, "instances": 64}).ladder.num_programs <= 64
    sizes = [cluster_config(**{**GOOD, "prefill_buckets": b}).ladder.score_tokens for b in ("16,512,1024", "1024,2048")]
    assert sizes == [(512,), (1024,)], "a size the operator gave"
    limits = limits_config(max_waiting=3, max_running=4, chunk_tokens=5)
    assert (limits.max_waiting, limits.max_running, limits.chunk_tokens) == (3, 4, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instances": 0}, "instances: "),
        ({"tp": 0}, "tp: "),
        ({"page_tokens": 24}, "page_tokens"),
        ({"ring_tokens": 100}, "ring_tokens: "),
        ({"dops": "1,16"}, "dops: "),
        ({"dops": "2,4"}, "dops: "),
        ({"dops": "1,x"}, "dops: "),
        ({"prefill_buckets": "100"}, "prefill_tokens: "),
        ({"prefill_buckets": ""}, "prefill-buckets: "),
        ({"decode_buckets": "8,1"}, "decode_rows: "),
        ({"attention": "dense"}, "attention: 'dense' is none of pallas, reference"),
        ({"prefill_buckets": ",".join(str(16 * i) for i in range(1, 20))}, "ladder: "),
    ],
)
def test_bad_flags(change, words):
    with pytest.raises(ConfigError, match=words):
        cluster_config(**{**GOOD, **change})


def test_kernel_sizes_are_read_from_their_file(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text("[]\n")
    assert cluster_config(**GOOD, kernel_sizes=path).kernel_sizes == "[]\n"
    with pytest.raises(ConfigError, match="kernel-sizes: .*missing.json.* can not be read"):
        cluster_config(**GOOD, kernel_sizes=tmp_path / "missing.json")
    path.write_text(" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="kernel-sizes: .* has more than 1048576 characters"):
        cluster_config(**GOOD, kernel_sizes=path)


def test_numbers_and_choices():
    assert numbers("x", "1, 2,3") == (1, 2, 3)
    assert one_of("x", "a", "a", "b") == "a"
    with pytest.raises(ConfigError, match="x: 'c' is none of a, b"):
        one_of("x", "c", "a", "b")


def test_a_model_that_is_no_folder_is_refused_by_name(tmp_path):
    flags.check_folder(tmp_path)
    (tmp_path / "file").touch()
    for missing in (tmp_path / "file", tmp_path / "owner" / "name"):
        with pytest.raises(ConfigError, match=missing.name):
            flags.check_folder(missing)


def test_http_has_a_port_or_is_off(tmp_path):
    assert flags.http_config(host="h", http_port=0, model=tmp_path, served_model_name=None) is None
    config = flags.http_config(host="h", http_port=80, model=tmp_path, served_model_name=None)
    assert config is not None
    assert (config.host, config.port, config.model_name, config.model_root) == ("h", 80, tmp_path.name, str(tmp_path))
    for name in ("", "a\n", "x" * 201):
        with pytest.raises(ConfigError, match="served-model-name"):
            flags.http_config(host="h", http_port=80, model=tmp_path, served_model_name=name)


def test_virtual_devices_do_not_correct_the_cost_model_unless_told():
    assert [flags.refits("auto", platform) for platform in ("default", "cpu")] == [True, False]
    assert flags.refits("on", "cpu")
    assert not flags.refits("off", "default")
    with pytest.raises(ConfigError, match="refit: 'yes'"):
        flags.refits("yes", "cpu")
