"""Values of flags that are lists, and what is said of wrong ones."""

import pytest

from loong_jax.config import ConfigError
from serving.bench import flags


def test_lists():
    assert flags.names("x", "a,b", ("a", "b", "c")) == ["a", "b"]
    assert flags.percentiles("50,99.9") == [50.0, 99.9]
    assert flags.numbers("x", "5,7") == [5, 7]
    assert flags.pairs("x", ["a=1", "b=c=d"]) == {"a": "1", "b": "c=d"}
    assert flags.pairs("x", None) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: flags.names("the-flag", "a,", ("a",)),
        lambda: flags.numbers("the-flag", "5,0"),
        lambda: flags.numbers("the-flag", "99999999999"),
        lambda: flags.numbers("the-flag", "five"),
        lambda: flags.pairs("the-flag", ["a"]),
        lambda: flags.pairs("the-flag", ["=a"]),
    ],
)
def test_wrong_values_name_their_flag(wrong):
    with pytest.raises(ConfigError, match="^the-flag: "):
        wrong()


@pytest.mark.parametrize("text", ["", "101", "-1", "nan", "a", "50,"])
def test_wrong_percentiles(text):
    with pytest.raises(ConfigError, match="metric-percentiles"):
        flags.percentiles(text)
