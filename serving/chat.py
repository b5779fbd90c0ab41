"""A model's chat template: messages to the text of a prompt.

What it is: finding the template in a checkpoint folder as `transformers` does, and having it rendered within bounds, by
a process of its own (`serving/chat_renderer.py`) that is ended when it takes too long or too much memory.
What it is not: the encoding of that text (`serving/tokenizer.py`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loong_jax.model.untrusted import CheckpointError, is_there, read_bytes, read_object, shown
from serving.chat_renderer import read_message, write_message
from serving.errors import InvalidField

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1024 * 1024
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RENDERER = Path(__file__).with_name("chat_renderer.py")


class ChatLimits(msgspec.Struct, frozen=True):
    """Bounds of one rendering. First CPU time, so that a busy machine refuses nothing; the clock is for what hangs."""

    cpu_s: float = 5.0
    wall_s: float = 60.0
    memory_bytes: int = 2 * 1024**3
    max_chars: int = 32 * 1024 * 1024


class ChatTemplate:
    """A template with the special tokens it may name. `render` may take a while: call it off the event loop."""

    def __init__(self, template: str, where: str, tokens: Mapping[str, str], limits: ChatLimits) -> None:
        self._template = template
        self._where = where
        self._tokens = dict(tokens)
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template of a checkpoint, None when it has none. Raises CheckpointError."""
        config = read_object(directory, CONFIG_FILE) if is_there(directory, CONFIG_FILE) else {}
        where = f"{directory / CONFIG_FILE}: chat_template"
        template = _default(config.get("chat_template"), where)
        if is_there(directory, TEMPLATE_FILE):
            where = str(directory / TEMPLATE_FILE)
            try:
                template = read_bytes(directory, TEMPLATE_FILE, MAX_TEMPLATE_BYTES).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{where}: is no UTF-8: {error}") from error
        if template is None:
            return None
        if len(template.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{where}: is longer than {MAX_TEMPLATE_BYTES} bytes")
        tokens = {name: token for name in _TOKENS if (token := _token(directory, config, name)) is not None}
        return cls(template, where, tokens, ChatLimits())

    def render(self, messages: Sequence[tuple[str, str]], now_s: float) -> str:
        """The prompt for (role, content) messages, up to where the assistant's answer begins. `now_s`, since the epoch,
        is what the template may print as today's date. Raises InvalidField."""
        context = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
        }
        answer = self._ask({"context": context, "now_s": now_s, "max_chars": self._limits.max_chars})
        text = answer.get("text")
        if not isinstance(text, str):
            raise InvalidField("messages", f"{self._where}: {answer.get('error')}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidField("messages", f"{self._where}: the rendered text is no Unicode: {error.reason}") from error
        return text

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._end()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                write_message(process.stdin, message)
                answer = read_message(process.stdout)
            except BrokenPipeError:
                answer = None
            return self._end() if answer is None else answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # -I: neither the environment nor the working folder add to what it imports.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_RENDERER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdin is not None
            bounds = {name: getattr(self._limits, name) for name in ("cpu_s", "wall_s", "memory_bytes")}
            write_message(self._process.stdin, {"template": self._template, **bounds})
        return self._process

    def _end(self) -> dict[str, Any]:
        """End the renderer, if it has not ended itself; the next rendering starts another. Says why it ended."""
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status == -signal.SIGPROF:
            return {"error": f"rendering took more than {self._limits.cpu_s:g} s of CPU time"}
        if status == -signal.SIGALRM:
            return {"error": f"rendering took more than {self._limits.wall_s:g} s"}
        return {"error": f"rendering ended with status {status}"}


def _default(value: Any, where: str) -> str | None:
    """The template, or of several named ones the default."""
    if isinstance(value, list):
        named = {
            item["name"]: item.get("template")
            for item in value
            if isinstance(item, dict) and isinstance(item.get("name"), str)
        }
        if "default" not in named:
            raise CheckpointError(f"{where}: has no template with the name default")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: {shown(value)} is no text")
    return value


def _token(directory: Path, config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{directory / CONFIG_FILE}: {name}: {shown(value)} is no text")
    return value
