"""What scripts/aot.py refuses, and its words for people. What it compiles: tests/loong_jax/aot/test_compiled.py."""

import subprocess
import sys
from pathlib import Path

import aot
import pytest

from loong_jax.aot.plan import Readiness, Room
from loong_jax.aot.report import GIB

ROOT = Path(__file__).resolve().parents[2]
RIGHT = {"topology": "v5e:2x4", "model": "llama-3-8b"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topology": "v5e"}, "topology: 'v5e' is no machine"),
        ({"model": "gpt-5"}, "model: 'gpt-5' is neither a folder"),
        ({"steps": "prefill,dance"}, "steps: 'dance' is none of prefill"),
        ({"layers": "99"}, "layers: 99 is not from 1 to 32"),
        ({"dop": "9"}, "dop: 9 instances of tp 1 need 9 devices"),
        ({"tp": "3", "dop": "2"}, "num_heads: 32 cannot be divided over tp = 3"),
        ({"context": "-1"}, "context: must be positive"),
        ({"prefill-tokens": "7"}, "prefill_tokens: 7 is no multiple"),
    ],
)
def test_refusals_name_the_field(wrong: dict[str, str], message: str):
    pytest.importorskip("libtpu")
    words = [word for name, value in {**RIGHT, **wrong}.items() for word in (f"--{name}", value)]
    with pytest.raises(ValueError, match=message):
        aot.compile_all(aot.arguments(words))


def test_a_refusal_is_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "aot.py", "--topology", "v5e:2", "--model", "llama-3-8b"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("aot: topology: 'v5e:2': a size of v5e has 2 dimensions")
    assert len(done.stderr.splitlines()) == 1


def test_summary():
    room, ready = Room(16 * GIB, 12 * GIB, 4 * GIB, 200_000, 800_000), Readiness(16, 160.0, 104, 1040.0)
    text = "\n".join(aot.summary(aot.Result("v5e:2x4", "llama-3-8b", 8, 4, 131072, 2176, [], room, ready)))
    assert "8 devices, 4 instances; 4.00 of 16.00 GiB of a device are left" in text
    assert "200,000 tokens on an instance, 800,000 on the machine" in text
    assert "16 programs until it serves, 160 s of CPU; 104 programs and device sets in all, 1040 s" in text
