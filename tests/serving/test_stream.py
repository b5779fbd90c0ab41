"""One request's way out, item by item (the rest of it is seen through the server in test_server.py)."""

import asyncio

import pytest

from loong_jax.types import Emit, Finish, FinishReason, Reject, RejectReason
from serving.errors import EngineFailed, InvalidField, NotServing, QueueFull
from serving.outbox import Crashed, Prefilled
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.stream import RequestStream, StreamStart
from tests.support.byte_tokenizer import EOS, byte_tokenizer


def new_stream(stop=(), stop_ids=(), text=True) -> RequestStream:
    start = StreamStart("id", "text", 3, 7, stop_ids)
    return RequestStream(start, byte_tokenizer().detokenizer([65]) if text else None, stop)


def emit(index: int, tokens: str | list[int], dop: int = 2) -> Emit:
    ids = tuple(tokens.encode() if isinstance(tokens, str) else tokens)
    return Emit(0, index, ids, tuple(-1.0 for _ in ids), dop)


def messages(stream: RequestStream, *items) -> list[pb.GenerateResponse]:
    async def run():
        for now_us, item in enumerate(items):
            stream.put(item, 1000 * now_us)
        return await asyncio.wait_for(stream.messages(), 30)

    return asyncio.run(run())


def test_what_came_meanwhile_is_one_message():
    (message,) = messages(new_stream(), emit(0, "he"), emit(2, "l"), emit(3, "lo"))
    assert message.tokens.text == "hello"
    assert bytes(message.tokens.token_ids) == b"hello"
    assert len(message.tokens.logprobs) == 5


def test_history_over_chunks_regroupings_and_a_recomputation():
    stream = new_stream()
    out = messages(
        stream,
        Prefilled(8, 100, False),
        Prefilled(8, 60, False),
        Prefilled(4, 10, True),
        emit(0, "a", 4),
        emit(1, "bc", 2),
        emit(3, "d", 3),
        Prefilled(8, 174, True),
        emit(4, "e", 8),
        emit(5, "f", 3),
        Finish(0, FinishReason.LENGTH, 6),
    )
    finished = out[-1].finished
    assert [(run.phase, run.dop, run.tokens) for run in finished.dop_history] == [
        (pb.PHASE_PREFILL, 8, 160),
        (pb.PHASE_PREFILL, 4, 10),
        (pb.PHASE_DECODE, 2, 2),
        (pb.PHASE_DECODE, 3, 1),
        (pb.PHASE_PREFILL, 8, 174),
        (pb.PHASE_DECODE, 3, 1),
    ]
    assert [run.start_us for run in finished.dop_history] == [0, 2000, 4000, 5000, 6000, 8000]
    assert stream.finished
    assert stream.engine_done


def test_tokens_after_a_stop_are_no_part_of_the_history():
    stream = new_stream(stop=["bc"])
    items = (Prefilled(8, 3, True), emit(0, "a", 8), emit(1, "bc", 2), emit(3, "d", 2), Prefilled(4, 7, True))
    *_, finished = messages(stream, *items, emit(4, "e", 4), emit(5, "f", 3))
    assert [(run.dop, run.tokens) for run in finished.finished.dop_history] == [(8, 3), (2, 2)]
    stream.put(emit(6, "g"), 0)
    assert stream.num_unread == 0, "what comes before the engine knows of the stop is dropped"


def test_a_stop_within_many_tokens_keeps_the_token_that_completes_it():
    stream = new_stream(stop=["lo w"])
    tokens, finished = messages(stream, emit(0, "hello wor"), Finish(0, FinishReason.LENGTH, 9))
    assert (tokens.tokens.text, len(tokens.tokens.token_ids)) == ("hel", 7)
    assert finished.finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.finished.usage.completion_tokens == stream.num_tokens == 7
    assert stream.stop_found


def test_a_stop_completed_only_by_the_last_flush():
    """An open character becomes U+FFFD at the end, which here is a stop string."""
    stream = new_stream(stop=["\ufffd"])
    tokens, finished = messages(stream, emit(0, [65, 0xE2]), Finish(0, FinishReason.LENGTH, 2))
    assert tokens.tokens.text == "A"
    assert finished.finished.matched_stop == "\ufffd"


def test_held_back_text_comes_with_the_end():
    stream = new_stream(stop=["lo!"])
    (first,) = messages(stream, emit(0, "hello"))
    assert first.tokens.text == "hel"
    rest, finished = messages(stream, Finish(0, FinishReason.LENGTH, 5))
    assert (rest.tokens.text, list(rest.tokens.token_ids)) == ("lo", [])
    assert finished.finished.finish_reason == pb.FINISH_REASON_LENGTH


def test_a_stop_id_has_no_text():
    stream = new_stream(stop_ids=(ord("o"), EOS))
    tokens, finished = messages(stream, emit(0, "hello"), Finish(0, FinishReason.STOP, 5))
    assert (tokens.tokens.text, len(tokens.tokens.token_ids)) == ("hell", 5)
    assert not finished.finished.HasField("matched_stop")


def test_ids_alone_without_a_tokenizer():
    tokens, finished = messages(new_stream(text=False), emit(0, "hi"), Finish(0, FinishReason.ABORT, 2))
    assert (tokens.tokens.text, list(tokens.tokens.token_ids)) == ("", [104, 105])
    assert finished.finished.finish_reason == pb.FINISH_REASON_ABORT


@pytest.mark.parametrize(
    ("item", "refusal", "words"),
    [
        (Reject(0, RejectReason.TOO_LARGE, "too much"), InvalidField, "text: too much"),
        (Reject(0, RejectReason.QUEUE_FULL, "full"), QueueFull, "full"),
        (Reject(0, RejectReason.DRAINING, "drains"), NotServing, "drains"),
        (Finish(0, FinishReason.ERROR, 1, "lost"), EngineFailed, "lost"),
        (Finish(0, FinishReason.ERROR, 1), EngineFailed, "engine failed"),
        (Crashed("gone"), EngineFailed, "gone"),
    ],
)
def test_what_ends_a_stream_badly(item, refusal, words):
    stream = new_stream()
    with pytest.raises(refusal, match=words):
        messages(stream, item)
    assert stream.engine_done


def test_a_token_that_comes_twice_is_our_bug():
    with pytest.raises(AssertionError, match="tokens from 0 after 1"):
        messages(new_stream(), emit(0, "a"), emit(0, "a"))
