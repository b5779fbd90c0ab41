"""A `loong serve` of this checkout as a child process, for the scripts that talk to a server.

What it is not: the server (`serving/`).
"""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from serving.client import LoongClient

ROOT = Path(__file__).resolve().parent.parent
READY_S = 600.0
_STOP_S = 30.0


@contextlib.contextmanager
def server(model: Path | None, flags: Mapping[str, str], log: Path, say: Callable[[str], None]) -> Iterator[str]:
    """A server on a free port; yields its address when it is ready. `model` None: the default model.

    Its words go to `log`, and until it is ready also to `say`. Raises RuntimeError when it ends or takes too long.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {**flags, "--port": str(port), "--cache-dir": str(ROOT / ".cache" / "loong")}
    words = ["serve", *([str(model)] if model else []), *(part for flag in flags.items() for part in flag)]
    say(" ".join(["loong", *words]))
    with log.open("w") as file:
        command = [sys.executable, "-c", "from serving.cli import main; main()", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"127.0.0.1:{port}"
        asyncio.run(_wait_ready(address, process, log, say))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


async def _wait_ready(address: str, process: subprocess.Popen, log: Path, say: Callable[[str], None]) -> None:
    """Pass the server's words on until it is ready."""
    shown = 0
    deadline_s = time.monotonic() + READY_S
    async with LoongClient(address) as client:
        while True:
            ready = await client.is_ready(timeout_s=1.0)
            text = log.read_text(errors="replace")
            whole = text.rfind("\n") + 1
            if whole > shown:
                say(text[shown : whole - 1])
                shown = whole
            if ready:
                return
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}; its log is {log}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the server was not ready within {READY_S:g} s; its log is {log}")
            await asyncio.sleep(0.3)
