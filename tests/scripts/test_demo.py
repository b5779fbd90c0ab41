"""What the demo shows, without a server; the server's side of it is tested in tests/serving/test_launch.py."""

import argparse

import demo
from rich.console import Console

from serving.proto.loong.v1 import loong_pb2 as pb

STATE = pb.State(
    groups=[
        pb.Group(phase=pb.PHASE_PREFILL, dop=3, instances=[0, 1, 2], requests=1, tokens_per_s=1234.4),
        pb.Group(phase=pb.PHASE_DECODE, dop=1, instances=[5], requests=24, tokens_per_s=99.9),
    ],
    instances=[pb.Instance(index=0, pages_used=25, pages_total=100, alive=True)],
    counters=pb.Counters(scale_ups=3, scale_downs=4, kv_bytes_migrated=5000, kv_bytes_rehomed=12),
)
ARGS = argparse.Namespace(seed=1, lengths="2000,1000,500", num_short=3, decoys=4, max_tokens=32)


def count(text: str) -> int:
    return len(text.split())


def printed(thing) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    thing(console)
    return console.export_text()


def test_documents_of_several_lengths_hide_what_they_are_asked_for():
    streams = demo.make_streams(ARGS, count)
    assert len(streams) == 6
    for stream, length in zip(streams, [2000, 1000, 500, *[demo.SHORT_TOKENS] * 3], strict=True):
        assert length - 60 < stream.num_prompt_tokens == count(stream.prompt) <= length
        assert stream.value in stream.prompt
        assert not stream.right
    assert {stream.name.rsplit(" ", 1)[0] for stream in streams} == {"pass key", "pair", "line"}
    assert len({stream.prompt[:300] for stream in streams}) == 6
    assert streams == demo.make_streams(ARGS, count)


def test_the_table_and_the_line_show_groups_and_pools():
    streams = demo.make_streams(ARGS, count)
    text = printed(lambda console: [console.print(table) for table in demo.tables(STATE, streams, 1.0)])
    for words in ("prefill", "0 1 2", "1,234", "24", "25 of 100", "3 scale-ups, 4 scale-downs"):
        assert words in text
    line = demo.line(STATE, streams, 1.0)
    assert "prefill DoP 3 on 0,1,2: 1 requests, 1,234 tokens/s | decode DoP 1 on 5: 24 requests" in line
    assert "pools 25%" in line


def test_the_summary_tells_histories_counters_and_errors():
    streams = demo.make_streams(ARGS, count)[:2]
    runs = [pb.DopRun(phase=pb.PHASE_PREFILL, dop=8, tokens=16_384), pb.DopRun(phase=pb.PHASE_DECODE, dop=3, tokens=47)]
    streams[0].finished = pb.Finished(dop_history=runs)
    streams[0].answer = f" {streams[0].value}. The sky [is] blue."
    streams[1].error = "INTERNAL: lost"
    text = printed(lambda console: demo.print_summary(console, streams, STATE))
    for words in (
        "prefill 8: 16384, decode 3: 47",
        "INTERNAL: lost",
        streams[0].value + ". The sky [is]",
        "right",
        "wrong",
        "1 of 2 answers are right",
        "3 and 4",
        "5,000 bytes",
        "compiles after readiness",
    ):
        assert words in text
