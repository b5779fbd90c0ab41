"""What the world did is told in one line; a bug is not."""

import pytest

from loong_jax.config import ConfigError
from serving.told_errors import fail, told_errors


def test_errors_of_the_world_end_with_their_words(capsys):
    with pytest.raises(SystemExit) as ended, told_errors():
        raise ConfigError("field: is wrong")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "loong: field: is wrong\n"
    with pytest.raises(SystemExit) as ended, told_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended:
        fail("no", code=2)
    assert ended.value.code == 2


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), told_errors():
        raise KeyError("x")
