"""A conversation over a live server: turns, commands, interrupts, refusals."""

import asyncio
import io
import sys

import grpc
import pytest

from serving import conversation as module
from serving.client import LoongClient
from serving.conversation import Conversation, lines, talk
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.live_http import TEMPLATE
from tests.support.live_server import live_server, server_in_a_thread


def said(turns):
    return [(turn.role, turn.content) for turn in turns]


def test_an_answer_joins_the_turns_and_a_refusal_does_not():
    async def play():
        async with live_server(tokenizer=byte_tokenizer(chat_template=TEMPLATE)) as live:
            out: list[str] = []
            talked = Conversation(live.client, "be brief", {"max_tokens": 4}, None)
            await talked.say("hi", out.append)
            answer = "".join(out)
            assert answer
            assert said(talked.turns) == [("system", "be brief"), ("user", "hi"), ("assistant", answer)]
            await talked.say("more", out.append)
            assert len(talked.turns) == 5
            talked._sampling = {"max_tokens": -1}
            with pytest.raises(grpc.RpcError):
                await talked.say("no", out.append)
            assert len(talked.turns) == 5
            talked.reset(None)
            assert talked.turns == []

    asyncio.run(play())


def test_lines_of_a_pipe_are_turns_and_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n/help\n/system x\nhi\n/reset\nhi\n/exit\nnever\n"))
    with server_in_a_thread(tokenizer=byte_tokenizer(chat_template=TEMPLATE)) as address:
        talk(lambda: LoongClient(address), None, {"max_tokens": 30}, 60.0)
    first, second, third = capsys.readouterr().out.splitlines()
    assert second == third != first  # the fake engine echoes the rendered conversation
    assert "[system]x[user]hi" in second


def test_without_a_template_it_ends_with_the_servers_words(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nhi\n"))
    with server_in_a_thread() as address, pytest.raises(grpc.RpcError) as caught:
        talk(lambda: LoongClient(address), None, {"max_tokens": 3}, 60.0)
    assert "messages: this model has no chat template" in caught.value.details()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_person_may_go_on_after_a_refusal_and_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal())
    typed = iter(["refused", "interrupted", "fine"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))

    class Refused(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self):
            return "the queue is full"

    async def say(self, text, write):
        if text == "refused":
            raise Refused
        if text == "interrupted":
            write("half")
            raise KeyboardInterrupt
        write("whole")

    monkeypatch.setattr(module.Conversation, "say", say)
    talk(lambda: LoongClient("127.0.0.1:1"), None, {}, None)
    out = capsys.readouterr()
    assert out.out == "half\nwhole\n"
    assert "RESOURCE_EXHAUSTED: the queue is full" in out.err


def test_lines_end_with_the_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb"))
    assert list(lines("> ")) == ["a", "b"]
