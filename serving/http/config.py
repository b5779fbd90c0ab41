"""Configuration of the HTTP listener; importing it needs none of the packages of the `http` extra.

What it is not: the flags it is made from (`serving/flags.py`).
"""

from __future__ import annotations

import msgspec


class HttpConfig(msgspec.Struct, frozen=True):
    """Where and how to listen, and what to call the model. `port` 0: any free port."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "loong"
    model_root: str = "loong"
    """The checkpoint: benchmarks that run beside the server load its tokenizer."""
    max_body_bytes: int = 64 * 1024 * 1024
    max_bodies_bytes: int = 512 * 1024 * 1024
    """Of all bodies being received."""
    max_connections: int = 8192
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    """A client that takes nothing for so long is cut off."""
