"""One table of status codes."""

import asyncio

import grpc
import pytest

from loong_jax.types import RejectReason
from serving.errors import (
    DuplicateRequest,
    EngineFailed,
    InvalidField,
    NotServing,
    QueueFull,
    Refusal,
    UnknownRequest,
    answering,
    rejected,
)


class Context:
    async def abort(self, code, details, trailing_metadata):
        self.ended = (code, details, trailing_metadata)


@pytest.mark.parametrize(
    ("refusal", "code", "hint"),
    [
        (InvalidField("top_p", "no"), grpc.StatusCode.INVALID_ARGUMENT, False),
        (UnknownRequest("x"), grpc.StatusCode.NOT_FOUND, False),
        (DuplicateRequest("x"), grpc.StatusCode.ALREADY_EXISTS, False),
        (QueueFull("x"), grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        (NotServing("x"), grpc.StatusCode.UNAVAILABLE, True),
        (EngineFailed("x"), grpc.StatusCode.INTERNAL, False),
    ],
)
def test_status_and_hint(refusal, code, hint):
    class Servicer:
        @answering
        async def method(self, request, context):
            raise refusal

    context = Context()
    asyncio.run(Servicer().method(None, context))
    assert context.ended[:2] == (code, str(refusal))
    assert bool(context.ended[2]) == hint


def test_a_bug_is_not_a_refusal():
    class Servicer:
        @answering
        async def method(self, request, context):
            raise KeyError("bug")

    with pytest.raises(KeyError):
        asyncio.run(Servicer().method(None, Context()))


def test_every_reject_reason_has_a_refusal():
    for reason in RejectReason:
        assert isinstance(rejected(reason, "words", "text"), Refusal)
