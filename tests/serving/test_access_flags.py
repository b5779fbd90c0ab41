"""The flags about who may call become a configuration, or words."""

import pytest

from loong_jax.config import ConfigError
from serving.access import AccessConfig
from serving.access_flags import access_config
from serving.keys import KeyLimits

GIVEN = {
    "host": "127.0.0.1",
    "api_keys": None,
    "key_requests_per_s": 0.0,
    "key_streams": 0,
    "tls_cert": None,
    "tls_key": None,
    "tls_client_ca": None,
    "allow_anyone": False,
}


def test_flags_become_the_configuration(tmp_path):
    assert access_config(**GIVEN) == AccessConfig()
    paths = [tmp_path / name for name in ("keys", "cert", "key", "ca")]
    given = dict(zip(("api_keys", "tls_cert", "tls_key", "tls_client_ca"), paths, strict=True))
    config = access_config(**{**GIVEN, **given, "host": "0.0.0.0", "key_requests_per_s": 2.0, "key_streams": 3})
    assert config == AccessConfig(paths[0], KeyLimits(2.0, 3), *paths[1:])


def test_an_open_server_is_refused_unless_it_is_meant():
    with pytest.raises(ConfigError, match="host: "):
        access_config(**{**GIVEN, "host": "0.0.0.0"})
    assert access_config(**{**GIVEN, "host": "0.0.0.0", "allow_anyone": True}).anyone
