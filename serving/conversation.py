"""`loong chat`: a conversation with a served model, from a terminal or a pipe.

What it is not: the template that makes a prompt of it, which is the model's and rendered by the server
(`serving/chat.py`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from serving.client import LoongClient, generate_request
from serving.proto.loong.v1 import loong_pb2 as pb

HELP = """/reset        begin anew
/system TEXT  begin anew with this system message
/exit         leave, as the end of the input does"""

Write = Callable[[str], object]


class Conversation:
    """Turns so far, and the next answer. `sampling` goes to `generate_request`."""

    def __init__(
        self, client: LoongClient, system: str | None, sampling: dict[str, Any], timeout_s: float | None
    ) -> None:
        self._client, self._sampling, self._timeout_s = client, sampling, timeout_s
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.turns = [] if system is None else [pb.Message(role="system", content=system)]

    async def say(self, text: str, write: Write) -> None:
        """Have the answer written as it comes; it becomes part of the conversation, as far as it came. Raises RpcError;
        what was said is then taken back, unless an answer had begun."""
        self.turns.append(pb.Message(role="user", content=text))
        pieces: list[str] = []
        try:
            request = generate_request(pb.Messages(messages=self.turns), **self._sampling)
            async for response in self._client.responses(request, self._timeout_s):
                if response.WhichOneof("event") == "tokens":
                    pieces.append(response.tokens.text)
                    write(response.tokens.text)
        finally:
            if pieces:
                self.turns.append(pb.Message(role="assistant", content="".join(pieces)))
            else:
                self.turns.pop()


def lines(prompt: str) -> Iterator[str]:
    """What a person types, or the lines of a pipe, to the end."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401 (arrow keys and history of `input`)
    except ImportError:
        pass
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def talk(
    client: Callable[[], LoongClient], system: str | None, sampling: dict[str, Any], timeout_s: float | None
) -> None:
    """Until the end of the input. An interrupt ends the answer under way, or else the conversation. Raises RpcError:
    from a pipe any; from a terminal those that no other words would mend."""
    interactive = sys.stdin.isatty()
    if interactive:
        sys.stderr.write("/help tells what else can be said; Ctrl-D leaves\n")
    with asyncio.Runner() as runner:
        connection = runner.run(_opened(client))
        conversation = Conversation(connection, system, sampling, timeout_s)
        try:
            for line in lines("> "):
                if line.strip() == "/exit":
                    break
                if line.strip() and not _command(conversation, line.strip()):
                    _answer(runner, conversation, line, interactive)
        finally:
            runner.run(connection.__aexit__())


async def _opened(client: Callable[[], LoongClient]) -> LoongClient:
    return await client().__aenter__()  # grpc.aio wants the loop that it will run in


def _command(conversation: Conversation, line: str) -> bool:
    """Whether the line was one."""
    name, _, rest = line.partition(" ")
    match name:
        case "/help":
            sys.stderr.write(HELP + "\n")
        case "/reset":
            conversation.reset(conversation.system)
        case "/system":
            conversation.reset(rest.strip() or None)
        case _:
            return False
    return True


def _answer(runner: asyncio.Runner, conversation: Conversation, line: str, interactive: bool) -> None:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        runner.run(conversation.say(line, write))
    except KeyboardInterrupt:
        if not interactive:
            raise
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
        mendable = code is not grpc.StatusCode.UNAUTHENTICATED and "no chat template" not in details
        if not interactive or not mendable:
            raise
        sys.stderr.write(f"{code.name}: {details}\n")
        return
    write("\n")
