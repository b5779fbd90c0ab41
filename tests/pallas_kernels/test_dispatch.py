"""Which implementation serves, and what is said when none does."""

import pytest

from pallas_kernels.dispatch import dispatch


def refuse(why):
    def implementation(x):
        raise NotImplementedError(why)

    return implementation


TABLE = {"fast": refuse("only page 16"), "other": refuse("no soft cap"), "reference": lambda x: 10 * x}
ORDER = {"cpu": ("other", "reference"), "tpu": ("fast", "other"), "gpu": ("reference",)}


def test_refusals_fall_through_to_the_next():
    assert dispatch("op", TABLE, ORDER, 4, platform="cpu") == 40


def test_all_refusals_are_reported_together():
    with pytest.raises(ExceptionGroup, match=r"op: .*fast, other") as caught:
        dispatch("op", TABLE, ORDER, 4, platform="tpu")
    assert [str(e) for e in caught.value.exceptions] == ["only page 16", "no soft cap"]
    assert caught.value.exceptions[0].__notes__ == ["op: implementation 'fast'"]


def test_a_forced_implementation_is_the_only_one():
    assert dispatch("op", TABLE, ORDER, 4, platform="tpu", implementation="reference") == 40
    with pytest.raises(ExceptionGroup, match="fast"):
        dispatch("op", TABLE, ORDER, 4, platform="cpu", implementation="fast")


def test_the_platform_defaults_to_that_of_the_process():
    assert dispatch("op", TABLE, ORDER, 4) == 40


def test_unknown_names_and_other_errors_are_not_refusals():
    with pytest.raises(ValueError, match="implementation: op has"):
        dispatch("op", TABLE, ORDER, 4, implementation="nope")
    with pytest.raises(ValueError, match="platform: op knows"):
        dispatch("op", TABLE, ORDER, 4, platform="npu")
    with pytest.raises(TypeError):
        dispatch("op", TABLE, ORDER, platform="cpu")
