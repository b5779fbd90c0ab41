"""The checked-in stubs are those of the protos."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools belongs to the dev extra")
def test_stubs_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gen_proto.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
