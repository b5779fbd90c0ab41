"""Chat templates in a checkpoint folder: found, refused by file, rendered in a process whose limits hold."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loong_jax.model.untrusted import CheckpointError
from serving.chat import _RENDERER, MAX_TEMPLATE_BYTES, ChatLimits, ChatTemplate
from serving.errors import InvalidField

LIMITS = ChatLimits(cpu_s=0.5, memory_bytes=512 * 1024**2, max_chars=100_000)
HI = [("user", "Hi")]


def write(folder, template="{{ messages[0].content }}", **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | fields))
    return folder


def rendered(template, **tokens):
    chat = ChatTemplate(template, "file: chat_template", tokens, LIMITS)
    try:
        return chat.render(HI, 0.0)
    finally:
        chat.close()


def loaded(folder):
    template = ChatTemplate.load(folder)
    assert template is not None
    try:
        return template.render(HI, 0.0)
    finally:
        template.close()


def test_where_it_is_found(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    write(tmp_path, None)
    assert ChatTemplate.load(tmp_path) is None
    write(tmp_path, "{{ bos_token }}{{ eos_token }}", bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    assert loaded(tmp_path) == "<s></s>"
    write(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}])
    assert loaded(tmp_path) == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].role }} é")
    assert loaded(tmp_path) == "user é"


@pytest.mark.parametrize(
    ("template", "fields", "words"),
    [
        (5, {}, "chat_template: 5 is no text"),
        ([], {}, "chat_template: has no template with the name default"),
        ([{"name": ["default"]}, 7], {}, "chat_template: has no template"),
        ([{"name": "default", "template": 1}], {}, "chat_template: 1 is no text"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), {}, "chat_template: is longer than"),
        ("x", {"bos_token": 7}, "bos_token: 7 is no text"),
        ("x", {"eos_token": {"content": []}}, "eos_token: .* is no text"),
    ],
)
def test_what_is_no_template_is_refused_by_file_and_field(tmp_path, template, fields, words):
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {words}"):
        ChatTemplate.load(write(tmp_path, template, **fields))


def test_a_template_file_that_is_no_text_or_elsewhere(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is no UTF-8"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is a link out of the folder"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .* more than the limit"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ '\\ud800' }}", "is no Unicode"),
        ("{{ 'a' * 10000000000 }}", "MemoryError"),
        ("{{ '%99999999999d' % 1 }}", "MemoryError|OverflowError|ValueError"),
        ("{% set x = namespace(s='ab') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}", "MemoryError"),
        ("{{ 'a' | center(200000) }}", "longer than 100000 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|MemoryError|ended with status"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", r"took more than 0\.5 s"),
        ("{{ 10 ** (10 ** 8) }}", r"took more than 0\.5 s|MemoryError"),
        ("{{ ('<' * 100000) | urlize }}", r"longer than|took more than 0\.5 s"),
    ],
)
def test_hostile_templates_end_with_words(template, words):
    start_s = time.monotonic()
    with pytest.raises(InvalidField, match=f"^messages: file: chat_template: .*({words})") as refusal:
        rendered(template)
    assert len(str(refusal.value)) < 500
    assert time.monotonic() - start_s < 30


def test_the_renderer_comes_back_after_it_was_ended():
    template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    )
    chat = ChatTemplate(template + "{% endfor %}{% endif %}ok", "file", {}, LIMITS)
    try:
        assert chat.render(HI, 0.0) == "ok"
        process = chat._process
        assert chat.render(HI, 0.0) == "ok"
        assert chat._process is process, "one process serves many renderings"
        with pytest.raises(InvalidField, match="took more than"):
            chat.render([("user", "loop")], 0.0)
        assert chat.render(HI, 0.0) == "ok"
        chat._process.kill()
        with pytest.raises(InvalidField, match="ended with status -9"):
            chat.render(HI, 0.0)
        assert chat.render(HI, 0.0) == "ok"
    finally:
        chat.close()
        chat.close()


def test_time_ends_a_renderer_whose_parent_ignores_the_signals():
    """As a server's process does once libtpu is loaded. In a process of its own: libtpu also sends SIGPROF, which ends
    a process that has stopped ignoring it."""
    program = """
import signal
from serving.chat import ChatLimits, ChatTemplate
from serving.errors import InvalidField

signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
for limits in (ChatLimits(cpu_s=0.5), ChatLimits(cpu_s=99.0, wall_s=1.0)):
    try:
        ChatTemplate(loop, "file", {}, limits).render([("user", "Hi")], 0.0)
    except InvalidField as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    by_cpu_time, by_the_clock = done.stdout.splitlines()
    assert by_cpu_time.endswith("took more than 0.5 s of CPU time")
    assert by_the_clock.endswith("took more than 1 s")


def test_threads_share_it():
    chat = ChatTemplate("{{ messages[0].content }}", "file", {}, LIMITS)
    try:
        with ThreadPoolExecutor(4) as threads:
            texts = [str(i) * 1000 for i in range(20)]
            assert list(threads.map(lambda text: chat.render([("user", text)], 0.0), texts)) == texts
    finally:
        chat.close()


def test_no_files_processes_or_sockets_once_confined():
    """The hook behind the sandbox, tried from Python itself."""
    program = f"import runpy, os, subprocess; runpy.run_path({str(_RENDERER)!r})['confine'](1 << 31); "
    for attempt in ("open('/etc/hostname')", "os.system('true')", "subprocess.run(['true'])", "import socket"):
        done = subprocess.run([sys.executable, "-c", program + attempt], capture_output=True, text=True, check=False)
        assert "a chat template may not do this" in done.stderr, (attempt, done.stderr)
