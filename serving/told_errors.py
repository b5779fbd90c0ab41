"""What the world may do wrong ends a command with one line on standard error; a bug keeps its traceback.

What it is not: statuses of a server's answers (`serving/errors.py`).
"""

from __future__ import annotations

import sys
from typing import NoReturn

import grpc

from loong_jax.config import ConfigError
from loong_jax.model.untrusted import CheckpointError
from serving.bench.command import BenchFailed
from serving.errors import PortTaken
from serving.launch import EngineLost
from serving.measuring import ProfilingError
from serving.tokenizer import TokenizerError
from serving.worker import ControlError

_WORLD = (
    OSError,
    TimeoutError,
    BenchFailed,
    CheckpointError,
    ConfigError,
    ControlError,
    EngineLost,
    PortTaken,
    ProfilingError,
    TokenizerError,
    grpc.FutureTimeoutError,
)


class told_errors:
    """Context manager around the work of a command."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        if isinstance(error, grpc.RpcError):
            fail(f"{error.code().name}: {error.details()}")  # type: ignore[attr-defined]
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(error, _WORLD):
            fail(str(error) or type(error).__name__)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with these words."""
    sys.stderr.write(f"loong: {message}\n")
    sys.exit(code)
