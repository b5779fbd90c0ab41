"""`loong` commands as processes of their own, whose words go to a file."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A `loong` command, started at once. As a context manager nothing is left running."""

    def __init__(self, log: Path, *args: str):
        self.log = log
        command = [sys.executable, "-c", "from serving.cli import main; main()", *args]
        with log.open("w") as file:
            self.popen = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def words(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, timeout_s: float = 600) -> None:
        deadline_s = time.monotonic() + timeout_s
        while words not in self.words():
            assert self.popen.poll() is None, self.words()
            assert time.monotonic() < deadline_s, self.words()
            time.sleep(0.1)

    def end(self, signum: int = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signum)
        try:
            return self.popen.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        if self.popen.poll() is None:
            os.kill(self.popen.pid, signal.SIGKILL)
            self.popen.wait(120)
