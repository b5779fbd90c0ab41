"""What a command tells a person while it works: lines on standard error, progress bars where there is a terminal.

What it is not: a command's result, which goes to standard output.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from serving.logs import set_up, tell

_log = logging.getLogger(__name__)
_LINE_S = 5.0
"""Between two lines about progress, where there is no terminal."""


class ConsoleReporter:
    """Reporter on standard error: lines, and progress bars where there is a terminal."""

    def __init__(self, log_format: str = "text", log_level: str = "info") -> None:
        """`log_format` "json": also what is said is a line of log."""
        self._json = log_format == "json"
        self._set_up = lambda: set_up(log_format, log_level)

    def __enter__(self) -> ConsoleReporter:
        self._set_up()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=self._json,
        )
        self._progress.start()
        self._start_s = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        if self._json:
            return tell(_log, logging.INFO, message)
        self._progress.console.print(
            f"[{time.monotonic() - self._start_s:7.1f} s] {message}", markup=False, highlight=False
        )

    def progress(self, what: str) -> Callable[[int, int], None]:
        task: TaskID | None = None
        said_s = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal task, said_s
            if task is None:
                task = self._progress.add_task(what)
            self._progress.update(task, completed=done, total=total)
            if done == total:
                self._progress.remove_task(task)
                self.say(f"{what}: done")
            elif not self._progress.console.is_terminal and time.monotonic() - said_s >= _LINE_S:
                said_s = time.monotonic()
                self.say(f"{what}: {100 * done // total}%")

        return update
