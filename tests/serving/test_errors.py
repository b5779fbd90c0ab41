"""One table of status codes."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from loong_jax.types import RejectReason
from serving.errors import (
    DuplicateRequest,
    EngineFailed,
    Forbidden,
    InvalidField,
    NotPossible,
    NotServing,
    QueueFull,
    Refusal,
    ShortDeadline,
    TooManyCalls,
    Unauthenticated,
    UnknownRequest,
    answering,
    rejected,
    rich_status,
)


class Context:
    async def abort(self, code, details, trailing_metadata):
        self.ended = (code, details, trailing_metadata)


@pytest.mark.parametrize(
    ("refusal", "code", "hint"),
    [
        (Unauthenticated("x"), grpc.StatusCode.UNAUTHENTICATED, False),
        (Forbidden("x"), grpc.StatusCode.PERMISSION_DENIED, False),
        (TooManyCalls("x", 70), grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        (ShortDeadline("x"), grpc.StatusCode.DEADLINE_EXCEEDED, False),
        (NotPossible("x"), grpc.StatusCode.FAILED_PRECONDITION, False),
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
    trailing = dict(context.ended[2])
    assert ("grpc-retry-pushback-ms" in trailing) == hint
    told = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert (told.code, told.message) == (code.value[0], str(refusal))
    assert told == rich_status(refusal)


def test_details_name_the_reason_the_field_and_the_time():
    def details(refusal: Refusal):
        found = {}
        for packed in rich_status(refusal).details:
            for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                if packed.Is(kind.DESCRIPTOR):
                    found[kind.DESCRIPTOR.name] = kind.FromString(packed.value)
        return found

    bad = details(InvalidField("sampling.top_p", "no"))
    assert set(bad) == {"ErrorInfo", "BadRequest"}
    assert (bad["ErrorInfo"].reason, bad["ErrorInfo"].domain) == ("INVALID_FIELD", "loong")
    (violation,) = bad["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("sampling.top_p", "sampling.top_p: no")
    full = details(TooManyCalls("x", 1500))
    assert full["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert len(rich_status(QueueFull("x" * 10_000)).SerializeToString()) < 4000, "metadata are bounded"
    reasons = [kind.reason for kind in Refusal.__subclasses__() if kind.__module__ == Refusal.__module__]
    assert len(set(reasons)) == len(reasons)


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
