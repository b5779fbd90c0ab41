"""Counting of backend compiles by listening to JAX.

What it is: the proof that nothing compiles in the serving path (DESIGN 5), and the question whether a compile came out
of JAX's persistent cache. What it is not: a compiler or a cache (`programs.py`, `program_store.py`).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax import monitoring

_BACKEND_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileWatch:
    """Counts backend compiles of the process that happen outside `ours()`, from `start` on."""

    def __init__(self) -> None:
        self.num_stray = 0
        self._thread = threading.local()
        self._started = False

    def start(self) -> None:
        if not self._started:
            self._started = True
            monitoring.register_event_duration_secs_listener(self._on_duration)

    def close(self) -> None:
        if self._started:
            monitoring.unregister_event_duration_listener(self._on_duration)
            self._started = False

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        self._thread.ours = True
        try:
            yield
        finally:
            self._thread.ours = False

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        # JAX calls this in the compiling thread.
        if event == _BACKEND_COMPILE_EVENT and not getattr(self._thread, "ours", False):
            self.num_stray += 1


def heard_cache_hit(action: Callable[[], Any]) -> tuple[Any, bool]:
    """The result of `action`, and whether JAX's own cache answered a compile of this thread meanwhile."""
    here = threading.get_ident()
    heard = []

    def listen(event: str, **_: Any) -> None:
        if event == _CACHE_HIT_EVENT and threading.get_ident() == here:
            heard.append(event)

    monitoring.register_event_listener(listen)
    try:
        return action(), bool(heard)
    finally:
        monitoring.unregister_event_listener(listen)
