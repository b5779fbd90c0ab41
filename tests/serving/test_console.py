"""What commands tell while they work, where there is no terminal."""

import pytest

from serving.console import ConsoleReporter


def test_lines_and_the_end_of_progress_go_to_standard_error(capsys: pytest.CaptureFixture) -> None:
    with ConsoleReporter() as reporter:
        reporter.say("[not markup]")
        update = reporter.progress("compiling")
        for done in range(4):
            update(done, 3)
    said = capsys.readouterr()
    assert said.out == ""
    assert "[not markup]" in said.err
    assert "compiling: done" in said.err
