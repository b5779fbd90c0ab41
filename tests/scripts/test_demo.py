"""What the demo shows, without a server; the server's side of it is tested in tests/serving/test_launch.py."""

import argparse
import importlib.util
from pathlib import Path

from rich.console import Console

from serving.proto.loong.v1 import loong_pb2 as pb

PATH = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
SPEC = importlib.util.spec_from_file_location("demo", PATH)
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)

STATE = pb.State(
    groups=[
        pb.Group(phase=pb.PHASE_PREFILL, dop=3, instances=[0, 1, 2], requests=1, tokens_per_s=1234.4),
        pb.Group(phase=pb.PHASE_DECODE, dop=1, instances=[5], requests=24, tokens_per_s=99.9),
    ],
    instances=[pb.Instance(index=0, pages_used=25, pages_total=100, alive=True)],
    counters=pb.Counters(scale_ups=3, scale_downs=4, kv_bytes_migrated=5000, kv_bytes_rehomed=12),
)
ARGS = argparse.Namespace(seed=1, num_long=2, long_tokens=16_384, num_short=24, max_tokens=32)


def printed(thing) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    thing(console)
    return console.export_text()


def test_the_prompts_are_the_issues():
    streams = demo.make_streams(ARGS, 1000)
    assert sum(len(stream.prompt) >= 16_384 for stream in streams) == 2
    assert len(streams) == 26
    assert all(0 <= token < 1000 for stream in streams for token in stream.prompt)
    assert streams == demo.make_streams(ARGS, 1000)


def test_the_table_and_the_line_show_groups_and_pools():
    streams = demo.make_streams(ARGS, 10)
    text = printed(lambda console: [console.print(table) for table in demo.tables(STATE, streams, 1.0)])
    for words in ("prefill", "0 1 2", "1,234", "24", "25 of 100", "3 scale-ups, 4 scale-downs"):
        assert words in text
    line = demo.line(STATE, streams, 1.0)
    assert "prefill DoP 3 on 0,1,2: 1 requests, 1,234 tokens/s | decode DoP 1 on 5: 24 requests" in line
    assert "pools 25%" in line


def test_the_summary_tells_histories_counters_and_errors():
    streams = demo.make_streams(ARGS, 10)[:2]
    runs = [pb.DopRun(phase=pb.PHASE_PREFILL, dop=8, tokens=16_384), pb.DopRun(phase=pb.PHASE_DECODE, dop=3, tokens=47)]
    streams[0].finished = pb.Finished(dop_history=runs)
    streams[1].error = "INTERNAL: lost"
    text = printed(lambda console: demo.print_summary(console, streams, STATE))
    for words in (
        "prefill 8: 16384, decode 3: 47",
        "INTERNAL: lost",
        "3 and 4",
        "5,000 bytes",
        "compiles after readiness",
    ):
        assert words in text
