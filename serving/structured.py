"""Structured answers: what a client asks for, into a grammar that compiles within bounds.

What it is: the check of a StructuredOutput, and `StructuredOutputs`, which has each new form compiled by a process that
can be ended (`serving/grammar_checker.py`) before this one compiles it. What it is not: which tokens may come next
(`loong_jax/grammar.py`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loong_jax.grammar import GrammarError, Grammars
from loong_jax.model.untrusted import is_there, read_bytes
from serving.errors import InvalidField
from serving.proto.loong.v1 import loong_pb2 as pb

_CHECKER = Path(__file__).with_name("grammar_checker.py")
_ROOT = _CHECKER.parent.parent
_KEPT = 64
_WALL_PER_CPU = 20
"""A compile that waits (for memory, say) ends after so many times its CPU time."""
_TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024


class StructuredLimits(msgspec.Struct, frozen=True):
    """Bounds of a form, and of compiling it. CPU time, so that a busy machine refuses nothing."""

    max_bytes: int = 64 * 1024
    max_choices: int = 1024
    cpu_s: float = 1.0
    memory_bytes: int = 4 * 1024**3


class Form(NamedTuple):
    """A form within bounds. `kind`: the field of StructuredOutput; `text`: what compiles to it."""

    kind: str
    text: str

    @property
    def field(self) -> str:
        return f"structured.{self.kind}"


def check_form(request: pb.GenerateRequest, limits: StructuredLimits) -> Form | None:
    """All that can be said without compiling; None when any answer will do. Raises InvalidField."""
    if not request.HasField("structured"):
        return None
    kind = request.structured.WhichOneof("form")
    if kind is None:
        raise InvalidField("structured", "give json_schema, json_object, regex, grammar or choice")
    form = Form(kind, _text_of(kind, request.structured, limits))
    if not form.text:
        raise InvalidField(form.field, "is empty")
    if len(form.text.encode()) > limits.max_bytes:
        raise InvalidField(form.field, f"longer than {limits.max_bytes} bytes")
    if request.ignore_eos:
        raise InvalidField("ignore_eos", f"contradicts {form.field}, which says where the answer ends")
    if request.sampling.min_tokens > 0:
        raise InvalidField("sampling.min_tokens", f"contradicts {form.field}, which says where the answer ends")
    return form


def _text_of(kind: str, structured: pb.StructuredOutput, limits: StructuredLimits) -> str:
    if kind == "json_object":
        if not structured.json_object:
            raise InvalidField("structured.json_object", "must be true where it is given")
        return "true"
    if kind != "choice":
        return getattr(structured, kind)
    texts = structured.choice.texts
    if not 1 <= len(texts) <= limits.max_choices:
        raise InvalidField("structured.choice", f"{len(texts)} texts are not within 1 to {limits.max_choices}")
    return json.dumps(list(texts), ensure_ascii=False)


def load_grammars(directory: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> Grammars:
    """Of a checkpoint. Raises GrammarError, whose words say why there are none, and CheckpointError."""
    if not is_there(directory, _TOKENIZER_FILE):
        raise GrammarError("this model has no tokenizer.json")
    if not eos_ids:
        raise GrammarError("this model has no end-of-sequence token")
    content = read_bytes(directory, _TOKENIZER_FILE, _MAX_TOKENIZER_BYTES)
    return Grammars(content.decode(errors="replace"), vocab_size, eos_ids)


class StructuredOutputs:
    """From forms to grammars that this process has compiled. `grammar` may take a while: call it off the event loop.
    `grammars`: those of the engine's executor, or why there are none."""

    def __init__(self, grammars: Grammars | str, limits: StructuredLimits) -> None:
        self._grammars = grammars
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._known: OrderedDict[Form, str] = OrderedDict()

    def check_available(self, form: Form) -> Grammars:
        """Raises InvalidField."""
        if isinstance(self._grammars, str):
            raise InvalidField(form.field, self._grammars)
        return self._grammars

    def grammar(self, form: Form) -> str:
        """Raises InvalidField."""
        grammars = self.check_available(form)
        with self._lock:
            grammar = self._known.get(form)
            if grammar is None:
                grammar = self._known[form] = self._checked(form, grammars)
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(form)
        try:
            grammars.prepare(grammar)
        except GrammarError as error:
            raise InvalidField(form.field, str(error)) from None
        return grammar

    def close(self) -> None:
        # Without the lock: a compile under way ends with its process.
        if self._process is not None:
            self._process.kill()

    def _checked(self, form: Form, grammars: Grammars) -> str:
        process = self._process = self._process or self._started(grammars)
        answer = _ask(process, form._asdict())
        if answer is None:
            self._process = None
            raise InvalidField(form.field, self._why_ended(process))
        if "error" in answer:
            raise InvalidField(form.field, answer["error"])
        return answer["grammar"]

    def _started(self, grammars: Grammars) -> subprocess.Popen[str]:
        # -I: neither the environment nor the working folder add to what it imports.
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHECKER), str(_ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        first = {
            "tokenizer_json": grammars.tokenizer_json,
            "vocab_size": grammars.vocab_size,
            "eos_ids": grammars.eos_ids,
            "cpu_s": self._limits.cpu_s,
            "wall_s": _WALL_PER_CPU * self._limits.cpu_s,
            "memory_bytes": self._limits.memory_bytes,
        }
        _send(process, first)
        return process

    def _why_ended(self, process: subprocess.Popen[str]) -> str:
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status == -signal.SIGPROF:
            return f"takes more than {self._limits.cpu_s:g} s to compile"
        if status == -signal.SIGALRM:
            return f"takes more than {_WALL_PER_CPU * self._limits.cpu_s:g} s to compile, waiting"
        if status == -signal.SIGABRT:  # what the library does when it gets no memory
            return f"takes more than {self._limits.memory_bytes >> 20} MiB to compile"
        return f"compiling it ended with status {status}"


def _send(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, as who reads from it will see


def _ask(process: subprocess.Popen[str], message: dict[str, Any]) -> dict[str, Any] | None:
    """None when the process ended."""
    assert process.stdout is not None
    _send(process, message)
    line = process.stdout.readline()
    return json.loads(line) if line else None
