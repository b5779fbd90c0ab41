"""The renderer in this process: what it makes of templates, beside `transformers`, and its messages.

Its limits are seen in test_chat.py, from outside.
"""

import io
import json

import jinja2
import pytest

from serving.chat_renderer import Renderer, read_message, write_message
from tests.support.fixtures import FIXTURES

CHAT = FIXTURES / "chat"
NOW_S = 1_750_000_000
RECORDED = json.loads((CHAT / "recorded.json").read_text(encoding="utf-8"))
CONVERSATIONS = json.loads((CHAT / "conversations.json").read_text(encoding="utf-8"))


def render(template, conversation=(("user", "Hi"),), max_chars=10_000, **context):
    messages = [{"role": role, "content": content} for role, content in conversation]
    context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True} | context
    return Renderer(template).render(context, NOW_S, max_chars)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_texts_are_those_of_transformers(name):
    template = (CHAT / f"{name}.jinja").read_text(encoding="utf-8")
    for conversation, expected in zip(CONVERSATIONS, RECORDED[name], strict=True):
        if isinstance(expected, dict):
            with pytest.raises(jinja2.TemplateError, match=expected["error"][:20]):
                render(template, conversation, bos_token="<s>", eos_token="</s>")
        else:
            assert render(template, conversation, bos_token="<s>", eos_token="</s>") == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ dict.__class__ }}{{ dict.__call__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ self._TemplateReference__context.environment.from_string('x').render() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ ('%s' | attr('__class__')).__mro__ }}",
        "{% include 'other' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_the_sandbox(template):
    """An attribute that the sandbox hides is undefined: an error where it is used, nothing where it is printed."""
    try:
        text = render(template)
    except (jinja2.TemplateError, TypeError, OverflowError):
        text = ""
    assert text == ""


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{", "{% endfor %}", "{% unknown %}", "{% generation %}", "(" * 10 + "{{ ( }}"]
)
def test_broken_templates(template):
    with pytest.raises(jinja2.TemplateSyntaxError):
        Renderer(template)


def test_the_length_of_the_text():
    assert render("{{ 'a' * 10 }}", max_chars=10) == "a" * 10
    with pytest.raises(ValueError, match="longer than 9 characters"):
        render("{{ 'a' * 10 }}", max_chars=9)
    with pytest.raises(ValueError, match="longer than 1000 characters"):
        render("{% for i in range(99999) %}{% for i in range(99999) %}a{% endfor %}{% endfor %}", max_chars=1000)


def test_messages_of_the_protocol():
    stream = io.BytesIO()
    write_message(stream, {"a": "弹性"})
    write_message(stream, {})
    whole = stream.getvalue()
    stream = io.BytesIO(whole)
    assert [read_message(stream) for _ in range(3)] == [{"a": "弹性"}, {}, None]
    assert read_message(io.BytesIO(whole[:10])) is None
