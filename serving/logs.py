"""Structured lines of log on standard error, as text or JSON; and a bound on how many there are.

Stdlib logging alone: `tell(logger, level, event, **fields)` makes a line of an event's name and its fields. What it is
not: a choice of what is worth a line (`serving/decision_log.py`, `serving/request_log.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_MAX_TEXT = 2000  # of a field or a message


class TextFormatter(logging.Formatter):
    """2026-11-28T01:02:03.456Z INFO waits request_id=a reason="no room"."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, _cut(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in getattr(record, "fields", {}).items()]
        if record.exc_info:
            words.append("\n" + self.formatException(record.exc_info))
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _cut(record.getMessage()),
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = _cut(value) if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up(log_format: str, level: str) -> None:
    """All loggers of this process write so, libraries only what is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("serving", "loong_jax"):
        logging.getLogger(package).setLevel(level.upper())


def tell(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """One line. Fields that are None are left out."""
    if logger.isEnabledFor(level):
        kept = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, "%s", event, extra={"fields": kept})


class Bounded:
    """`tell`, at most `burst` lines of an event in `window_s`; the next line then says how many were left out."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        burst: int = 20,
        window_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger, self._burst, self._window_s, self._clock = logger, burst, window_s, clock
        self._windows: dict[str, list[float]] = {}  # event -> start of its window, lines in it, lines left out

    def tell(self, level: int, event: str, **fields: Any) -> None:
        if not self._logger.isEnabledFor(level):
            return
        now_s = self._clock()
        window = self._windows.setdefault(event, [now_s, 0, 0])
        if now_s - window[0] >= self._window_s:
            window[:2] = [now_s, 0]
        if window[1] >= self._burst:
            window[2] += 1
            return
        left_out, window[2] = int(window[2]), 0
        window[1] += 1
        tell(self._logger, level, event, **fields, left_out=left_out or None)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."


def _quoted(value: Any) -> str:
    """A client's text stays within its field and its line."""
    text = _cut(str(value))
    plain = text.isprintable() and text and not set(text) & set(' "=')
    return text if plain else msgspec.json.encode(text).decode()
