"""Machines by name: what is refused, and what devices a name stands for."""

import shutil

import pytest

from loong_jax.aot import targets
from loong_jax.aot.targets import TargetError, target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "'v5e' is no machine and size"),
        ("v5e:2x", "no machine and size"),
        ("v9:2x2", "'v9' is not known, as in v5e:2x4"),
        ("v7x:2x2x1", "'v7x' is not known.*tpu7x"),
        ("v5e:2x2x2", "a size of v5e has 2 dimensions"),
        ("v5p:2x4", "a size of v5p has 3 dimensions"),
        ("h200:2x4", "a size of h200 has 1 dimensions"),
        ("v5e:0x4", "not from 1 to 4096 chips"),
        ("v5e:999x999", "not from 1 to 4096 chips"),
    ],
)
def test_refusals_name_the_field(name: str, message: str):
    with pytest.raises(TargetError, match=f"^topology: .*{message}"):
        target(name)


def test_gpus_need_ptxas(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="ptxas is not on the PATH"):
        target("h200:8")
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="the CUDA plugin of JAX is not installed"):
        target("h200:8")
    with pytest.raises(TargetError, match="libtpu"):
        target("v5e:2x4")
