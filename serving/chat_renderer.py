"""A program that renders chat templates in a process of its own: `serving/chat.py` starts it, by its path.

A template is code from a checkpoint. Jinja's sandbox keeps it from the interpreter's insides, but not from loops
without end or strings without bounds; those the limits of this process end, and a hook refuses files, processes and
sockets should the sandbox ever leak. Imports nothing of Loong. What it is not: the choice of a template, or of what to
do when rendering fails.

Protocol, on standard input and output: a length (8 bytes, little endian), then that much JSON. The first message is
{"template", "cpu_s", "wall_s", "memory_bytes"}; each later one {"context", "now_s", "max_chars"} is answered by
{"text"} or {"error"}.
"""

import importlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import IO, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_REFUSED = (
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "pty.",
    "mmap.",
    "winreg.",
    "glob.",
    "sqlite3.",
)
_MAX_ERROR_CHARS = 300


class _Generation(Extension):
    """`{% generation %}`, which marks assistant text in training, is no more than its body here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works, as in Jinja
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute {name!r}")


class Renderer:
    """One template, compiled as `transformers` compiles it."""

    def __init__(self, template: str) -> None:
        self._now_s = 0.0
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        self._template = environment.from_string(template)

    def render(self, context: dict[str, Any], now_s: float, max_chars: int) -> str:
        """Raises whatever a template can make Python raise, ValueError when the text is too long."""
        self._now_s = now_s
        pieces, num_chars = [], 0
        for piece in self._template.generate(context):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars:
                raise ValueError(f"the rendered text is longer than {max_chars} characters")
        return "".join(pieces)

    def _strftime_now(self, format: str) -> str:
        return datetime.fromtimestamp(self._now_s).strftime(format)


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """None at the end of the stream."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        return None
    length = int.from_bytes(prefix, "little")
    content = stream.read(length)
    return json.loads(content) if len(content) == length else None


def write_message(stream: IO[bytes], message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _refuse(event: str, args: tuple) -> None:
    if event.startswith(_REFUSED):
        raise PermissionError(f"a chat template may not do this: {event}")


def confine(memory_bytes: int) -> None:
    """From here on: no more memory than this, no core dumps, and no files, processes or sockets."""
    for module in ("jinja2.debug", "encodings.ascii", "encodings.unicode_escape", "_strptime"):
        importlib.import_module(module)  # what Jinja would import later, when files cannot be opened any more
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)


def _let_timers_end_this() -> None:
    """Signals that are ignored or blocked stay so in a new process, and libtpu ignores SIGPROF where it is loaded."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))


def _set_timers(cpu_s: float, wall_s: float) -> None:
    """The signal of either ends the process; 0 stops them."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def _answer(renderer: Renderer, message: dict[str, Any], cpu_s: float, wall_s: float) -> dict[str, Any]:
    _set_timers(cpu_s, wall_s)
    try:
        return {"text": renderer.render(message["context"], message["now_s"], message["max_chars"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]}
    finally:
        _set_timers(0, 0)


def main() -> None:
    first = read_message(sys.stdin.buffer)
    if first is None:
        return
    cpu_s, wall_s = first["cpu_s"], first["wall_s"]
    confine(first["memory_bytes"])
    _let_timers_end_this()
    _set_timers(cpu_s, wall_s)
    try:
        renderer, broken = Renderer(first["template"]), None
    except Exception as error:
        renderer, broken = None, {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]}
    while (message := read_message(sys.stdin.buffer)) is not None:
        answer = broken if renderer is None else _answer(renderer, message, cpu_s, wall_s)
        write_message(sys.stdout.buffer, answer or {})


if __name__ == "__main__":
    main()
